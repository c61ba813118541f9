"""Spread over workers an analysis has the numbers that it has without, also when one dies, and says what went wrong."""

import multiprocessing
import os
import pickle
import tempfile
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pandas as pd
import psutil
import pytest
import torch

import qlab
from qlab.analysis import Analysis
from qlab.errors import Cancelled, InputError
from qlab.progress import Cancellable
from qlab.sim.transport import to_bytes
from tests.analysis.small import calibrated, data

SETTINGS = {"estimate": False, "probe_batches": 1, "bits": [None, 3]}
TABLES = ("summary", "enabled", "disabled", "noise")


@pytest.fixture(scope="module")
def pool():
    """Two fresh processes, as a script would start them."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


class Travelling(Executor):
    """Calls at once, but all that goes there and back as bytes by plain pickle, as between processes."""

    def __init__(self):
        self.sizes = []

    def submit(self, fn, /, *args, **kwargs):
        future, sent = Future(), pickle.dumps((fn, args))
        self.sizes.append(len(sent))
        fn, args = pickle.loads(sent)
        future.set_result(pickle.loads(pickle.dumps(fn(*args, **kwargs))))
        return future


class Fresh(Travelling):
    """As above, every call by a worker that has seen nothing before."""

    def submit(self, fn, /, *args, **kwargs):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(super().submit, fn, *args, **kwargs).result()


class Failing(Executor):
    """Every call fails as it does where a worker lacks a package."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_exception(ModuleNotFoundError("No module named 'qlab'"))
        return future


class Waiting(Executor):
    """Takes work and never does it."""

    def __init__(self):
        self.futures = []

    def submit(self, fn, /, *args, **kwargs):
        self.futures.append(Future())
        return self.futures[-1]


def same(left: Analysis, right: Analysis) -> bool:
    """Whether all numbers are the same, to the last bit."""
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(left, name), getattr(right, name), check_exact=True)
    return left.brute_force == right.brute_force and left.samples == right.samples


def negative_mean(model):
    """A score that calls the model, and fails where only the head is quantized."""
    on = [name for name, quantizer in model.quantizers.items() if quantizer.enabled]
    if on and all(name.startswith("head") for name in on):
        raise ValueError("no such pie")
    return -sum(float(model(x).abs().mean()) for x, _ in data())


@pytest.mark.parametrize("score", [qlab.Accuracy(data(5)), qlab.SQNR(data(5)), negative_mean])
def test_processes_find_the_numbers_that_one_finds(pool, score):
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), score)
    spread = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), score, executor=pool)
    assert same(serial, spread)
    assert not [note for note in spread.notes if "workers" in note]
    if score is negative_mean:
        assert (
            spread.enabled.set_index("layer").note["head"].tolist() == ["the score raised ValueError: no such pie"] * 2
        )


def test_processes_keep_an_early_stop(pool):
    sim, many = calibrated(qlab.presets.w4a4()), data(batches=12, size=40)
    settings = {"estimate": False, "probe_batches": 1, "stop_when_stable": 0.8}
    serial = qlab.QuantAnalyzer(**settings).measure(sim, many, qlab.SQNR(many))
    spread = qlab.QuantAnalyzer(**settings).measure(sim, many, qlab.SQNR(many), executor=pool)
    assert serial.samples < sum(len(x) for x, _ in many)
    for name in ("summary", "enabled", "disabled"):
        pd.testing.assert_frame_equal(getattr(serial, name), getattr(spread, name), check_exact=True)


def test_threads_find_the_numbers_too():
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data())
    with ThreadPoolExecutor(2) as executor:
        assert same(serial, qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), executor=executor))


def test_what_travels_is_plain_and_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    executor = Travelling()
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data())
    assert same(serial, qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), executor=executor))
    assert len(executor.sizes) >= 3
    assert os.listdir(tmp_path) == []


def test_the_sim_travels_once_for_each_worker_and_not_with_each_piece(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    many, sim = data(40), calibrated()
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(sim, many)
    executor = Travelling()
    assert same(serial, qlab.QuantAnalyzer(**SETTINGS).measure(sim, many, executor=executor))
    assert len(executor.sizes) == 40
    package = len(to_bytes(sim))
    assert sum(size > package for size in executor.sizes) == 2
    assert sum(executor.sizes[2:]) < 38 * package / 2
    fresh = Fresh()  # workers that come later lack it, say so, and get it
    assert same(serial, qlab.QuantAnalyzer(**SETTINGS).measure(sim, many, executor=fresh))
    assert sum(size > package for size in fresh.sizes) == 40
    assert len(fresh.sizes) == 38 + 40


def test_a_worker_that_dies_takes_no_number_along(pool):
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(40), qlab.SQNR(data(40)))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(os.getpid).result()
        rows = []

        def dies(row):
            rows.append(row)
            if len(rows) == 1:
                next(iter(executor._processes.values())).kill()

        spread = qlab.QuantAnalyzer(**SETTINGS).measure(
            calibrated(), data(40), qlab.SQNR(data(40)), executor=executor, on_row=dies
        )
    assert same(serial, spread)
    assert any("were computed here: BrokenProcessPool" in note for note in spread.notes)


def test_why_workers_fail_is_said():
    spread = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), executor=Failing())
    assert same(qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data()), spread)
    assert any("computed here: ModuleNotFoundError: No module named 'qlab'" in note for note in spread.notes)


def test_an_error_of_the_model_itself_is_raised(pool):
    broken = [*data(), (torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.long))]  # an image with two channels
    with pytest.raises(InputError, match=r"got \[4, 2, 8, 8\]"):
        qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), qlab.Accuracy(broken), executor=pool)


def test_cancelling_ends_what_was_sent():
    executor, progress, sim = Waiting(), Cancellable(), calibrated()

    class Stop:
        def step(self, done, total, text=""):
            if executor.futures:
                progress.cancel()
            progress.step(done, total, text)

    before = sim.to_pandas()
    with pytest.raises(Cancelled):
        qlab.QuantAnalyzer(**SETTINGS).measure(sim, data(), executor=executor, progress=Stop())
    assert executor.futures
    assert all(future.cancelled() for future in executor.futures)
    assert sim.to_pandas().equals(before)


@pytest.mark.slow
def test_dask_workers_find_the_numbers_also_when_one_is_killed():
    distributed = pytest.importorskip("distributed")
    many = data(40)
    score = qlab.SQNR(many)
    serial = qlab.QuantAnalyzer(**SETTINGS).measure(calibrated(), data(), score)
    with (
        distributed.LocalCluster(
            2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        ours = psutil.Process()
        listening = [
            connection.laddr.ip
            for process in (ours, *ours.children(recursive=True))
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert set(listening) == {"127.0.0.1"}
        killed = []

        def kill(row):
            busy = [address for address, keys in client.processing().items() if keys] if not killed else []
            for nanny in cluster.workers.values():
                if nanny.worker_address in busy[:1]:
                    killed.append(nanny.pid)
                    os.kill(nanny.pid, 9)

        spread = qlab.QuantAnalyzer(**SETTINGS).measure(
            calibrated(), data(), score, executor=client.get_executor(), on_row=kill
        )
    assert killed
    assert same(serial, spread)
