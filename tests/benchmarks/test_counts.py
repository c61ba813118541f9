"""The regression gate for speed: what is computed, counted, so that a busy machine cannot fail it.

Counts are of kernels (as torch dispatches them), of forwards (calls of the last linear layer), of layers run again, of
bytes kept and of events; bounds are the exact numbers, or what follows from the size of the network.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import qlab
from qlab.graph import Layer, Replay
from qlab.sim import Role

ROUNDING = ("round_.default", "clamp_.default", "mul_.Tensor")
# What moves no number; and other names of the same work: a 1x1 convolution is a product of matrices.
VIEWS = {
    "view",
    "expand",
    "t",
    "transpose",
    "detach",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "alias",
    "split",
    "select",
    "slice",
}
SAME = {"bmm.default": "convolution.default", "div_.Tensor": "div.Tensor"}
NETWORKS = ("mobilenet", "resnet")


class Kernels(TorchDispatchMode):
    """Counts the kernels that torch calls within the context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] not in VIEWS:
            self.counts[SAME.get(function.__name__, function.__name__)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def forwards(self) -> int:
        """Calls of the networks' one linear layer."""
        return self.counts["addmm.default"]


@contextmanager
def images_seen() -> Iterator[list[int]]:
    """The number of images of every call of the networks' one linear layer."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(len(x))
        return linear(x, *args, **kwargs)

    torch.nn.functional.linear = counting
    try:
        yield seen
    finally:
        torch.nn.functional.linear = linear


@pytest.fixture(scope="module")
def data() -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Three batches of 4 images to calibrate on, and two labelled ones of 8."""
    digits = qlab.examples.digits()
    images = torch.cat(digits.calibration(1))
    x, labels = digits.test[0]
    return list(images[:12].split(4)), list(zip(x[:16].split(8), labels[:16].split(8), strict=True))


@pytest.fixture(scope="module")
def networks(data) -> dict[str, tuple[nn.Module, qlab.QuantSim]]:
    found = {}
    for name in NETWORKS:
        model = getattr(qlab.examples, name)()
        sim = qlab.QuantSim(model, data[0][0])
        sim.calibrate(data[0])
        found[name] = model, sim
    return found


def quantized_outputs(sim: qlab.QuantSim) -> int:
    return sum(entry.role is Role.QUANTIZED and entry.output is not None for entry in sim.placed.values())


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_costs_four_kernels_a_quantizer_and_no_relu_that_rounding_does_anyway(networks, data, name):
    (model, sim), x = networks[name], data[0][0]
    sim(x)  # weights are quantized once
    with Kernels() as of_float:
        model(x)
    with Kernels() as of_sim:
        sim(x)
    with Kernels() as switched_off, sim.quantization_off():
        sim(x)
    assert switched_off.counts == of_float.counts
    rounded = dict.fromkeys((*ROUNDING, "div.Tensor"), quantized_outputs(sim))
    assert of_sim.counts - of_float.counts == Counter(rounded)
    assert of_float.counts - of_sim.counts == Counter({"relu.default": of_float.counts["relu.default"]})


@torch.no_grad()
def test_an_edit_of_one_weight_rounds_that_weight_alone(networks, data):
    sim, x = copy.deepcopy(networks["mobilenet"][1]), data[0][0]
    sim(x)
    with Kernels() as before:
        sim(x)
    layer = next(layer for layer in sim.layers.values() if layer.weight is not None)
    assert layer.weight is not None
    layer.weight.bits = 4
    _ = layer.weight.encoding
    with Kernels() as after:
        sim(x)
    assert after.counts["div.Tensor"] - before.counts["div.Tensor"] == 1
    assert after.total - before.total <= 8


@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_is_one_forward_a_batch_and_a_fixed_number_of_kernels_a_quantizer(networks, data, name):
    sim, (x, *_) = copy.deepcopy(networks[name][1]), data[0]
    kernels = []
    for batches in (2, 5):
        with Kernels() as counted:
            sim.calibrate([x] * batches)
        assert counted.forwards == batches
        kernels.append(counted.total)
    with Kernels() as off, sim.quantization_off():
        sim.output(x)
    a_batch = (kernels[1] - kernels[0]) / 3 - off.total
    assert a_batch <= 24 * quantized_outputs(sim)
    first = kernels[0] - 2 * (a_batch + off.total)  # ranges found, encodings chosen: once, whatever the data
    assert first <= 100 * len(sim.quantizers)


def reached(sim: qlab.QuantSim, start: Layer) -> set[int]:
    """Every layer that computes with the value of `start`, found by following users."""
    found, waiting = set(), [start]
    while waiting:
        layer = waiting.pop()
        if layer.index not in found:
            found.add(layer.index)
            waiting += layer.users
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_an_edit_runs_the_layers_below_it_and_no_other(networks, data, name):
    sim, x = copy.deepcopy(networks[name][1]), data[0][0]
    replay = Replay(sim.graph, [sim.inputs(x)], sim.call, sim.fingerprint, full_share=1.0)
    replay.outputs()
    assert replay.counts.layer_calls == len(sim.graph)
    for layer in list(sim.layers.values())[:: len(sim.graph) // 6]:
        if layer.role is not Role.QUANTIZED:
            continue
        before = replay.counts.layer_calls
        assert layer.output is not None
        layer.output.bits -= 1
        replay.outputs()
        assert replay.counts.layer_calls - before == len(reached(sim, layer.layer))
        replay.outputs()  # nothing changed: nothing runs
        assert replay.counts.layer_calls - before == len(reached(sim, layer.layer))


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.5, 1.1])
def test_the_probe_cache_holds_what_it_says_and_no_more_than_its_budget(networks, data, share):
    sim, x = networks["mobilenet"][1], data[0][0]

    def kept(max_bytes: int) -> tuple[int, int]:
        """(bytes told, bytes of the memory truly held)"""
        replay = Replay(sim.graph, [sim.inputs(x), sim.inputs(x)], sim.call, sim.fingerprint, max_bytes=max_bytes)
        replay.outputs()
        memory = {}
        for stored in replay._batches:
            for leaf in pytree.tree_leaves(stored.values):
                memory[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return replay.counts.bytes_kept, sum(memory.values())

    _, everything = kept(1 << 40)
    budget = int(share * everything)
    told, held = kept(budget)
    assert held <= 1.05 * budget
    assert told == pytest.approx(held, rel=0.05)
    assert held >= min(budget, everything) - 2 * x[:, :1].numel() * 4 * 96  # no value left out that had room


def test_the_analyzer_needs_little_more_than_half_of_brute_force(networks, data):
    calibration, labelled = data
    sim = networks["resnet"][1]
    with images_seen() as seen:
        analysis = qlab.QuantAnalyzer(estimate=False, probe_batches=1).measure(
            sim, calibration[:1], qlab.SQNR(labelled)
        )
    cases = 1 + 3 + 2 * len(analysis.units)
    assert analysis.brute_force.forwards == cases * len(labelled)
    assert analysis.work.forwards <= 0.55 * analysis.brute_force.forwards
    # Every case ends in the linear layer; beside them the noise of layers and what is remembered are a few forwards.
    assert len(seen) <= (cases + 3) * len(labelled)


def test_auto_quant_scores_each_state_once(networks, data):
    calibration, labelled = data
    score, sim = qlab.Accuracy(labelled), copy.deepcopy(networks["mobilenet"][1])
    auto = qlab.AutoQuant(techniques=("CrossLayerEqualization",), stop_at_target=False)
    with images_seen() as seen:
        result = auto.apply(sim, calibration, score=score)
    scored = [record for record in result.records if record.score == record.score]
    evaluated = sum(count == 8 for count in seen)
    # one for each state, one for the float model's own results beside its score
    assert evaluated <= (len(scored) + 1) * len(labelled)
    assert seen.count(4) <= 3 * len(calibration)  # folding and equalization find ranges again


def test_mixed_precision_passes_over_the_data_a_few_times_whatever_the_number_of_layers(networks, data):
    calibration, labelled = data
    for name in NETWORKS:
        sim = copy.deepcopy(networks[name][1])
        with images_seen() as seen:
            report = qlab.MixedPrecision(verify=2).apply(sim, calibration, score=qlab.SQNR(labelled))
        kinds = report.values["front"].kind.value_counts()
        verified = sum(kinds.get(kind, 0) for kind in ("verified", "uniform", "current"))
        assert seen.count(8) <= (verified + 1) * len(labelled)
        assert seen.count(4) <= 13 * len(calibration), name


def test_an_edit_announces_itself_once(networks, data):
    lab = qlab.Lab(copy.deepcopy(networks["mobilenet"][1]), data[0])
    heard: list[str] = []
    for name in lab.events.guards.keys() | {"edited", "selected", "scores", "noise", "history_changed", "error"}:
        getattr(lab.events, name).connect(lambda *_, name=name: heard.append(name))
    layer = next(layer.name for layer in lab.sim.layers.values() if layer.weight is not None)
    lab.set(layer, "weight", bits=4)
    lab.set("*", "weight", bits=5)
    assert heard == 2 * ["edited", "history_changed", "scores"]  # the second of them changed 27 layers
