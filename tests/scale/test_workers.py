"""Calibration, mixed precision and AutoQuant on workers give the numbers of one process, whoever dies on the way."""

import copy
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import Cancelled, InputError, NonFiniteData
from qlab.progress import Cancellable
from qlab.sim.workers import Workers
from tests.techniques.models import lived

BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(5)]


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip
    return lived(model)


@pytest.fixture(scope="module")
def sim() -> qlab.QuantSim:
    sim = qlab.QuantSim(small(), BATCHES[0], qlab.presets.w4a8())
    sim.configure("*", output={"rule": "sqnr"})
    sim.calibrate(BATCHES)
    return sim


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request) -> Iterator[Executor]:
    if request.param == "processes":
        yield request.getfixturevalue("processes")
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    else:
        distributed = pytest.importorskip("distributed")
        with (
            distributed.LocalCluster(2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client.get_executor()


def grids(sim: qlab.QuantSim) -> dict[str, Any]:
    found = {}
    for name, quantizer in sim.quantizers.items():
        state = quantizer.state()
        seen = state.statistics
        found[name] = state.encoding.scale.tolist(), state.encoding.zero_point.tolist(), seen.elements, seen.masked
        if not name.endswith("weight"):
            found[name] += seen.counts.tolist(), seen.minimum.tolist(), seen.maximum.tolist(), seen.first.tolist()
    return found


def test_calibration_shared_among_workers_equals_that_of_one(sim, executor):
    alone, shared = copy.deepcopy(sim), copy.deepcopy(sim)
    shared.calibrate([BATCHES[0]])
    alone.calibrate(BATCHES)
    assert grids(shared) != grids(alone)
    shared.calibrate(BATCHES, executor=executor)
    assert grids(shared) == grids(alone)


def test_mixed_precision_on_workers_chooses_the_same(sim, executor):
    def chosen(**settings: Any) -> tuple[Any, list[float]]:
        twin = copy.deepcopy(sim)
        report = qlab.MixedPrecision(bits=(3, 4, 8), budget=5, **settings).apply(twin, BATCHES[:2])
        return report.rows, [v for v in report.values["front"].verified if v == v]

    assert chosen(executor=executor) == chosen()


def stages(result: Any) -> list[tuple[Any, ...]]:
    return [
        (r.stage, r.parent, r.technique, r.verdict, r.reason, r.score, -1 if math.isnan(r.sqnr) else r.sqnr)
        for r in result.records
    ]


def test_auto_quant_on_workers_finds_the_same_sim_by_the_same_steps(sim, executor):
    settings = {"techniques": ("CrossLayerEqualization", "GPTQ"), "stop_at_target": False}
    score = qlab.SQNR(BATCHES[:2])
    alone = qlab.AutoQuant(**settings).apply(sim, BATCHES, score=score)
    shared = qlab.AutoQuant(**settings, executor=executor).apply(sim, BATCHES, score=score)
    assert stages(shared) == stages(alone)
    assert shared.lineage == alone.lineage
    assert shared.notes == alone.notes
    assert torch.equal(shared.sim.output(BATCHES[0]), alone.sim.output(BATCHES[0]))


def test_what_killed_workers_took_along_is_computed_here(sim):
    alone, shared = copy.deepcopy(sim), copy.deepcopy(sim)
    alone.calibrate(BATCHES)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os._exit, 1)
        shared.calibrate(BATCHES, executor=pool)
        assert grids(shared) == grids(alone)
        workers = Workers(pool, 5)
        assert list(workers.map(add, [1, 2], lambda: None)) == [6, 7]
        assert workers.lost == 2
        assert "BrokenProcessPool" in workers.reason
        settings = {"techniques": (), "stop_at_target": False}
        result = qlab.AutoQuant(**settings, executor=pool).apply(sim, BATCHES[:1])
        assert stages(result) == stages(qlab.AutoQuant(**settings).apply(sim, BATCHES[:1]))
        assert "were lost by workers and computed again here" in " ".join(result.notes)


def add(shared: int, piece: int) -> int:
    return shared + piece


def refuses(shared: int, piece: int) -> int:
    raise ZeroDivisionError(piece)


def test_a_piece_that_is_itself_at_fault_raises_its_own_error():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError, match="2"):
        Workers(pool, 0).start(refuses, 2).result()


def test_bad_data_cancel_and_nothing_to_do_are_as_without_workers(sim):
    twin, before = copy.deepcopy(sim), grids(sim)
    bad = [*BATCHES[:3], torch.full_like(BATCHES[0], math.nan)]
    stop = Cancellable()
    stop.cancel()
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(NonFiniteData, match=r"calibration batch 3 .*the data itself"):
            twin.calibrate(bad, executor=pool)
        with pytest.raises(InputError, match="at least one batch"):
            twin.calibrate([], executor=pool)
        with pytest.raises(Cancelled):
            twin.calibrate(BATCHES, stop, executor=pool)
    assert grids(twin) == before
