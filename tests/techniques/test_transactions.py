"""What every technique promises, checked over all that are registered: all or nothing, the same again, no bad surprise.

A technique added later is checked as well; one that is slow at its defaults gets quick settings here.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import Cancelled, InputError, QlabError
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.techniques import TECHNIQUES, Technique
from tests.techniques.models import lived

QUICK: dict[str, dict[str, Any]] = {"AdaRound": {"iterations": 30}}
# AutoQuant works on copies and gives back another sim: it has tests of its own.
OWN = {n: made for n, made in TECHNIQUES.items() if made.__module__.startswith("qlab.") and n != "AutoQuant"}


def technique(name: str) -> Technique:
    return OWN[name](**QUICK.get(name, {}))


@pytest.fixture(scope="module")
def original() -> qlab.QuantSim:
    """A calibrated sim with BatchNorms, a depthwise layer, a flatten; tests work on copies."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip
    sim = qlab.QuantSim(lived(model), torch.randn(2, 3, 8, 8), qlab.presets.w4a8())
    sim.calibrate([x for x, _ in labelled()])
    return sim


def labelled(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(count)
    ]


def score() -> qlab.Evaluation:
    return qlab.SQNR(labelled(2))


def state(sim: qlab.QuantSim) -> dict[str, Any]:
    """Everything of a sim that a person or a result could notice."""
    found: dict[str, Any] = dict(sim.state_dict())
    for name, quantizer in sim.quantizers.items():
        assert isinstance(quantizer, Quantizer)
        of = quantizer.state()
        found |= {f"{name}.settings": (of.spec, of.enabled, of.frozen), f"{name}.codes": of.codes}
        found |= {f"{name}.correction": of.bias_correction, f"{name}.seen": of.statistics.counts}
        encoding = of.encoding
        found[f"{name}.grid"] = None if encoding is None else (encoding.qmin, encoding.qmax, encoding.axis)
        if encoding is not None:
            found |= {f"{name}.scale": encoding.scale, f"{name}.zero_point": encoding.zero_point}
        if isinstance(quantizer, WeightQuantizer):
            found[f"{name}.quantized"] = quantizer.quantized().detach()
    found["layers"] = [(layer.name, layer.kind, type(layer.module)) for layer in sim.graph]
    found["edits"], found["folded"] = list(sim.graph.edits), sorted(sim.graph.folded)
    found["modes"] = {name: module.training for name, module in sim.model.named_modules()}
    found["flags"] = (sim.training, sim.quantization_enabled, sim.preset, len(sim.log))
    found["output"] = sim.output(labelled(1)[0])
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y

    return [key for key in sorted({*a, *b}) if key not in a or key not in b or not same(a[key], b[key])]


class Stopping:
    """A progress that counts steps and stops at one of them in some way."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.steps, self._at, self._error = 0, at, error

    def step(self, done: int, total: int, text: str = "") -> None:
        if self.steps == self._at and self._error is not None:
            raise self._error
        self.steps += 1


@pytest.mark.parametrize("name", OWN)
def test_however_it_ends_early_the_sim_is_as_it_was_and_the_next_run_is_right(original, name):
    before, whole, counting = state(original), copy.deepcopy(original), Stopping()
    technique(name).apply(whole, labelled(), score=score(), progress=counting)
    want, last = state(whole), counting.steps - 1
    assert last >= 0, "it never reports, so it cannot be cancelled"
    sim = copy.deepcopy(original)
    ways = [(0, Cancelled("stop")), (last // 2, KeyboardInterrupt()), (last, ValueError("broken"))]
    for at, error in ways:
        with pytest.raises(type(error)):
            technique(name).apply(sim, labelled(), score=score(), progress=Stopping(at, error))
        assert differing(state(sim), before) == [], f"stopped at step {at} of {last} by {type(error).__name__}"
    technique(name).apply(sim, labelled(), score=score())
    assert differing(state(sim), want) == []


@pytest.mark.parametrize("name", OWN)
def test_broken_data_changes_nothing(original, name):
    def failing():
        yield labelled()[0]
        raise OSError("the disk is gone")

    class Failing:
        def __iter__(self):
            return failing()

    sim, before = copy.deepcopy(original), state(original)
    x, labels = labelled(1)[0]
    for data, error in (
        (Failing(), OSError),
        ([(x[:, :2], labels)], InputError),
        ([], QlabError),
        (5, InputError),
    ):
        try:
            technique(name).apply(sim, data, score=score())
        except error:
            assert differing(state(sim), before) == []
        else:
            assert not OWN[name].needs_data, "it took data that is none"
            sim = copy.deepcopy(original)
    if OWN[name].needs_data:
        with pytest.raises(InputError, match=name):
            technique(name).apply(sim)


@pytest.mark.parametrize("name", OWN)
def test_the_users_batches_are_left_alone(original, name):
    data, sim = labelled(), copy.deepcopy(original)
    copies = [(x.clone(), y.clone()) for x, y in data]
    technique(name).apply(sim, data, score=score())
    for batch, kept in zip(data, copies, strict=True):
        assert torch.equal(batch[0], kept[0])
        assert torch.equal(batch[1], kept[1])


CASES: dict[str, Callable[[qlab.QuantSim], None]] = {
    "2 bits": lambda sim: sim.configure("*", weight={"bits": 2}),
    "16 bits": lambda sim: sim.configure("*", weight={"bits": 16}),
    "per channel": lambda sim: sim.configure("*", weight={"granularity": "per_channel"}),
    "a layer excluded": lambda sim: sim.configure("3", weight={"enabled": False}, output={"enabled": False}),
    "all-zero weights": lambda sim: sim.model[6].weight.data.zero_(),
    "dead channels": lambda sim: (sim.model[1].weight.data[:4].zero_(), sim.model[1].bias.data[:4].fill_(-1)),
    "folded before": lambda sim: qlab.BatchNormFolding().apply(sim),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OWN)
def test_awkward_sims_are_handled(original, name, case):
    sim = copy.deepcopy(original)
    CASES[case](sim)
    if case == "all-zero weights":
        sim.calibrate([x for x, _ in labelled()])
    report = technique(name).apply(sim, labelled(), score=score())
    assert report.technique == name
    assert report.summary
    for note in (report.summary, *report.notes):
        assert "\n" not in note
    output = sim.output(labelled(1)[0])
    assert torch.isfinite(output).all()
    for layer in sim.layers.values():
        if layer.weight is not None and layer.weight.rounding is not None:
            encoding = layer.weight.required_encoding()
            assert int(layer.weight.rounding.min()) >= encoding.qmin
            assert int(layer.weight.rounding.max()) <= encoding.qmax
    if case == "a layer excluded":
        assert not sim["3"].weight.enabled
        assert sim["3"].weight.rounding is None


@pytest.mark.parametrize("name", OWN)
def test_docstring_settings_and_report_tell_a_person_what_it_is(original, name):
    made = OWN[name]
    assert made.__doc__
    assert not made.__doc__.startswith(f"{name}(")  # not the signature that dataclasses write
    assert name in dir(qlab), "it cannot be reached as qlab." + name
    report = technique(name).apply(copy.deepcopy(original), labelled(), score=score())
    assert report.seconds > 0
    assert name in repr(report)
    assert "<p>" in report._repr_html_()
    assert len({tuple(row) for row in report.rows}) <= 1  # one table: every row has the same columns
