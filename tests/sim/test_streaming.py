"""Both models over all batches at the same place: the arguments of every stop are those of full runs."""

import copy

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.sim.streaming import stream
from tests.analysis.small import calibrated, data

LAYERS = ["head", "stem.0", "depthwise.0", "right"]


def batches() -> list[Tensor]:
    return [x for x, _ in data()]


def inputs_of(sim: qlab.QuantSim, name: str, batch: Tensor) -> Tensor:
    """What the layer is called with in a full run of the sim."""
    caught: list[Tensor] = []

    def call(layer, args, kwargs):
        if layer.name == name:
            caught.append(args[0].clone())
        return sim.call(layer, args, kwargs)

    with torch.no_grad():
        sim.graph.run(sim.inputs(batch), call)
    return caught[0]


@pytest.mark.parametrize("max_bytes", [2 << 30, 1])  # 1: every state waits in a file
def test_the_arguments_of_every_stop_are_those_of_full_runs(max_bytes):
    sim = calibrated()
    exact = copy.deepcopy(sim)
    exact.configure("*", weight={"enabled": False}, output={"enabled": False})
    seen: list[str] = []
    for stop in stream(sim, batches(), LAYERS, max_bytes=max_bytes):
        seen.append(stop.layer.name)
        assert (stop.position, stop.total, stop.batches) == (len(seen) - 1, 4, 3)
        for (x, xh), batch in zip(stop.inputs(), batches(), strict=True):
            assert torch.equal(x, inputs_of(exact, stop.layer.name, batch))
            assert torch.equal(xh, inputs_of(sim, stop.layer.name, batch))
        again = [xh for _, xh in stop.inputs()]
        assert all(torch.equal(a, xh) for a, (_, xh) in zip(again, stop.inputs(), strict=True))
    assert seen == ["stem.0", "depthwise.0", "right", "head"]  # in order of execution


def test_what_is_changed_at_a_stop_is_seen_by_the_layers_after_it():
    sim, found = calibrated(), {}
    for stop in stream(sim, batches(), LAYERS):
        found[stop.layer.name] = [xh for _, xh in stop.inputs()]
        if stop.layer.name == "depthwise.0":
            sim["depthwise.0"].weight.bits = 2
    for xh, batch in zip(found["right"], batches(), strict=True):
        assert torch.equal(xh, inputs_of(sim, "right", batch))
    before = calibrated()
    assert not torch.equal(found["right"][0], inputs_of(before, "right", batches()[0]))


def test_data_are_read_once_and_no_layer_runs_twice_or_beyond_the_last_stop(monkeypatch):
    sim, reads, calls = calibrated(), [], []

    class Counted:
        def __iter__(self):
            reads.append(1)
            return iter(batches())

    call = sim.call
    monkeypatch.setattr(sim, "call", lambda layer, *given: calls.append(layer.name) or call(layer, *given))
    for _ in stream(sim, Counted(), ["stem.0", "depthwise.0", "left"]):
        pass
    assert len(reads) == 1
    assert calls.count("stem.0") == calls.count("depthwise.0") == 3
    assert not {"left", "right", "head"} & set(calls)


def test_parameters_that_are_read_by_functions_are_those_of_the_moment():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 5)

        def forward(self, codes: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.table(codes), self.table.weight)

    torch.manual_seed(0)
    codes = torch.randint(7, (4, 3))
    sim = qlab.QuantSim(Tied(), codes, qlab.presets.w4a8())
    sim.calibrate([codes])
    (linear,) = (layer for layer in sim.graph if layer.kind == "linear")
    (stop,) = stream(sim, [codes], [linear.name])
    ((of_float, of_sim),) = stop.arguments()
    assert torch.equal(of_float.args[0], sim.model.table(codes))
    assert torch.equal(of_float.args[1], sim.model.table.weight)
    weight = next(layer.weight for layer in sim.layers.values() if layer.weight is not None)
    assert torch.equal(of_sim.args[1], weight.quantized())


def test_no_layer_and_no_batch_end_at_once():
    sim = calibrated()
    assert list(stream(sim, batches(), [])) == []
    (stop,) = stream(sim, [], ["left"])
    assert stop.batches == 0
