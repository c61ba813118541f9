"""Corrections take the mean of the quantization error away, layer after layer, and leave the float model alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from tests.techniques.models import images, lived


def make(model: nn.Module | None = None, bits: int = 3) -> tuple[qlab.QuantSim, list[Tensor]]:
    """A calibrated sim whose weights have few bits, so that rounding shifts means."""
    batches = [torch.randn(16, 3, 8, 8) + 0.5 for _ in range(3)]
    sim = qlab.QuantSim(lived(model or images()), batches[0])
    qlab.BatchNormFolding().apply(sim)
    sim.configure("*", weight={"bits": bits})
    sim.calibrate(batches)
    return sim, batches


def mean_errors(sim: qlab.QuantSim, batches: list[Tensor]) -> dict[str, Tensor]:
    """For each layer with a weight, mean over all data of (simulated - float) output, a channel."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        outputs: list[dict[str, Tensor]] = []
        for call in (sim.call, lambda layer, args, kwargs: layer.module(*args) if layer.module else args[0]):
            seen: dict[str, Tensor] = {}

            def watch(layer, args, kwargs, call=call, seen=seen):
                value = call(layer, args, kwargs)
                if sim.placed[layer.name].weight is not None:
                    seen[layer.name] = value.double().clone()
                return value

            with torch.no_grad():
                sim.graph.run(sim.inputs(batch), watch)
            outputs.append(seen)
        for name in outputs[0]:
            error = (outputs[0][name] - outputs[1][name]).movedim(1, 0).flatten(1).mean(1)
            sums[name] = sums.get(name, torch.zeros(())) + error / len(batches)
    return sums


def test_the_empirical_correction_takes_away_every_mean_error_and_nothing_of_the_float_model():
    sim, batches = make()
    want, biases = sim.float_output(batches[0]), {k: v.clone() for k, v in sim.model.state_dict().items()}
    before = mean_errors(sim, batches)
    report = qlab.BiasCorrection().apply(sim, batches)
    after = mean_errors(sim, batches)
    assert [row["layer"] for row in report.rows] == ["0", "3", "6", "10", "16", "19"]
    fused = [name for name in before if name != "19"]  # the last output is rounded after its correction
    assert max(float(before[name].abs().max()) for name in fused) > 0.05
    assert max(float(after[name].abs().max()) for name in fused) < 1e-5
    assert torch.equal(sim.float_output(batches[0]), want)
    assert all(torch.equal(v, biases[k]) for k, v in sim.model.state_dict().items())
    again = {name: sim[name].weight.bias_correction.clone() for name in before}
    qlab.BiasCorrection().apply(sim, batches)  # starts anew: not on top of the first
    assert all(torch.equal(sim[name].weight.bias_correction, again[name]) for name in before)


def test_one_linear_layer_by_hand():
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(2, 1)), torch.randn(2, 2))
    with torch.no_grad():
        sim.model[0].weight.copy_(torch.tensor([[1.0, 0.4]]))
    sim["0"].weight.set(bits=2, scheme="strict_symmetric")  # grid -1, 0, 1: the weight 0.4 becomes 0
    sim.configure("*", output={"enabled": False})
    qlab.BiasCorrection().apply(sim, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    assert float(sim["0"].weight.bias_correction) == pytest.approx(0.4 * 3.0)


def test_a_layer_without_a_bias_takes_a_correction_in_every_kind(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False),
    )  # fmt: skip
    sim, batches = make(model)
    qlab.BiasCorrection().apply(sim, batches)
    errors = mean_errors(sim, batches)
    assert float(errors["0"].abs().max()) < 1e-5
    step = float(sim["2"].output.encoding.scale)  # outputs that are rounded on their own are off by less than a step
    assert float(errors["2"].abs().max()) < step / 2
    sim.save(tmp_path / "sim.safetensors")
    assert torch.equal(
        qlab.load(tmp_path / "sim.safetensors", model, batches[0]).output(batches[0]), sim.output(batches[0])
    )


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.Hardtanh(0, 1.5),
    "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(8),
    "none": nn.Identity(),
}


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_analytic_correction_is_what_data_would_say(name, folded):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), ACTIVATIONS[name], nn.Linear(8, 5))
    x = torch.randn(40_000, 4)  # what a linear layer makes of it is normal, so the assumption holds
    with torch.no_grad():
        y = model[0](x)
        lived(model)
        model[1].running_mean.copy_(y.mean(0))
        model[1].running_var.copy_(y.var(0))
    sim = qlab.QuantSim(model, x[:2])
    if folded:
        qlab.BatchNormFolding().apply(sim)
    sim.configure("*", output={"enabled": False})
    sim["0"].weight.enabled = False
    sim["3"].weight.bits = 3
    qlab.BiasCorrection().apply(sim, [x])
    measured = sim["3"].weight.bias_correction.clone()
    report = qlab.BiasCorrection(method="analytic").apply(sim)
    assert report.values == {"corrected": 1}
    assert measured.abs().max() > 0.05
    assert torch.allclose(sim["3"].weight.bias_correction, measured, atol=0.01)


def test_the_analytic_correction_follows_pools_and_flatten_and_lists_what_it_cannot():
    sim, _ = make()
    report = qlab.BiasCorrection(method="analytic").apply(sim)
    assert [row["layer"] for row in report.rows] == ["3", "6", "16", "19"]
    assert "2 layers have no BatchNorm whose mean could be followed to their input: 0, 10" in report.notes[0]
    assert sim["0"].weight.bias_correction is None  # its input is that of the model
    assert sim["10"].weight.bias_correction is None  # a maximum has another mean
    assert sim["16"].weight.bias_correction.shape == (10,)  # through average pool and flatten: 16 columns a channel


def test_functions_and_shared_weights_are_listed():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.twice = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(F.linear(x, self.weight)))

    sim = qlab.QuantSim(Odd(), torch.randn(4, 3))
    sim.calibrate([torch.randn(4, 3)])
    report = qlab.BiasCorrection().apply(sim, [torch.randn(4, 3)])
    assert report.summary == "no layer has a quantized weight: nothing to correct"
    assert "linear (called as a function)" in report.notes[0]
    assert "twice (its weight is used more than once)" in report.notes[0]


def test_it_asks_for_the_data_it_needs_and_says_that_it_is_deprecated():
    sim, _ = make()
    with pytest.raises(InputError, match="BiasCorrection needs data"):
        qlab.BiasCorrection().apply(sim)
    with pytest.raises(InputError, match="at least one batch"):
        qlab.BiasCorrection().apply(sim, [])
    assert "AdaRound" in qlab.BiasCorrection.deprecated
    assert "Deprecated" in qlab.BiasCorrection.__doc__


def test_a_layer_that_is_not_quantized_is_not_corrected():
    sim, batches = make()
    sim["6"].weight.enabled = False
    report = qlab.BiasCorrection().apply(sim, batches)
    assert "6" not in [row["layer"] for row in report.rows]
    assert sim["6"].weight.bias_correction is None
