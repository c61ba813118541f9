"""Mixed precision: the front against every combination, what moves together, and bits found in a few forwards."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError, NotCalibrated
from qlab.settings import SettingError
from qlab.techniques.lagrangian import sweep, within
from qlab.techniques.mixed_precision_groups import groups_of, multiply_accumulates
from tests.techniques.models import lived


def three_layers(seed: int = 0) -> tuple[qlab.QuantSim, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    batches = [torch.randn(32, 8) for _ in range(4)]
    sim = qlab.QuantSim(model, batches[0], qlab.presets.w8a8(per_channel=True))
    sim.calibrate(batches)
    return sim, batches


def noise(sim: qlab.QuantSim, batches: list[Tensor]) -> float:
    return 10 ** (-float(sim.evaluate(qlab.SQNR(batches))) / 10)


def with_bits(sim: qlab.QuantSim, bits: tuple[int, ...]) -> qlab.QuantSim:
    twin = copy.deepcopy(sim)
    for name, width in zip(("0", "2", "4"), bits, strict=True):
        twin[name].weight.bits = width
    return twin


def is_on_lower_hull(cost: float, loss: float, others: np.ndarray) -> bool:
    """Whether no point and no mixture of two others costs at most as much and loses less."""
    a, b = others[:, None, :], others[None, :, :]
    left, right = np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 0], b[..., 0])
    spans = (left <= cost) & (cost <= right) & (right > left)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (cost - a[..., 0]) / (b[..., 0] - a[..., 0])
        between = a[..., 1] + share * (b[..., 1] - a[..., 1])
    cheaper = others[others[:, 0] <= cost, 1]
    return loss <= cheaper.min() + 1e-9 and (not spans.any() or loss <= between[spans].min() + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_sweep_gives_exactly_the_lower_hull_of_all_combinations(seed):
    random = np.random.default_rng(seed)
    groups = [[(float(c), float(loss)) for c, loss in random.uniform(0, 10, (3, 2))] for _ in range(4)]
    everything = np.array([np.sum(combination, axis=0) for combination in itertools.product(*groups)])
    found = sweep(groups)
    assert all(is_on_lower_hull(choice.cost, choice.loss, everything) for choice in found)
    corners = {(round(c, 9), round(loss, 9)) for c, loss in hull_corners(everything)}
    assert corners <= {(round(choice.cost, 9), round(choice.loss, 9)) for choice in found}


def hull_corners(points: np.ndarray) -> list[tuple[float, float]]:
    """The corners of the lower left hull: what minimises loss + p * cost for some p > 0, by trying many p."""
    prices = np.geomspace(1e-4, 1e4, 20001)
    best = (points[None, :, 1] + prices[:, None] * points[None, :, 0]).argmin(1)
    return [tuple(points[i]) for i in np.unique(best)]


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_kept_and_used_at_least_as_well_as_by_the_hull_alone(seed):
    random = np.random.default_rng(100 + seed)
    groups = [[(float(c), float(loss)) for c, loss in random.uniform(0, 10, (4, 2))] for _ in range(5)]
    for budget in np.linspace(5, 50, 7):
        choice = within(groups, budget)
        on_hull = [c for c in sweep(groups) if c.cost <= budget]
        assert (choice is None) == (not on_hull)
        if choice is not None:
            assert choice.cost <= budget
            assert choice.loss <= on_hull[-1].loss + 1e-12


def test_points_of_the_front_lie_on_the_true_hull_of_every_combination_within_the_error_of_the_estimate():
    sim, batches = three_layers()
    front = qlab.MixedPrecision(bits=(3, 5, 8), budget=5.0, verify=50).front(sim, batches)
    sizes = [sim[name].weight.weight.numel() / 8192 for name in ("0", "2", "4")]
    everything = {}
    for bits in itertools.product((3, 5, 8), repeat=3):
        cost = sum(size * width for size, width in zip(sizes, bits, strict=True))
        everything[bits] = cost, noise(with_bits(sim, bits), batches)
    truth = np.array(list(everything.values()))
    swept = [point for point in front.points if point.kind in ("verified", "uniform")]
    assert len(swept) >= 7
    for point in swept:
        bits = tuple(point.configuration[name] for name in ("0", "2", "4"))
        cost, loss = everything[bits]
        assert point.cost == pytest.approx(cost)
        assert float(point.score) == pytest.approx(-10 * math.log10(loss), abs=1e-6)  # verified as it says
        assert abs(point.predicted - float(point.score)) < 2.5
        if point.kind == "verified" and bits != tuple(front.chosen.configuration.values()):
            same_cost = truth[truth[:, 0] <= cost + 1e-9]
            assert loss <= 1.6 * same_cost[:, 1].min()


def test_the_chosen_bits_are_set_and_every_other_setting_stays():
    sim, batches = three_layers()
    before = sim.to_pandas()
    report = qlab.MixedPrecision(bits=(3, 5, 8), budget=5.0).apply(sim, batches)
    chosen = report.values["configuration"]
    assert {name: sim[name].weight.bits for name in chosen} == chosen
    assert sum(sim[n].weight.weight.numel() * b for n, b in chosen.items()) / 8192 <= report.values["budget"]
    assert float(sim.evaluate(qlab.SQNR(batches))) == pytest.approx(report.values["score"])
    after = sim.to_pandas()
    outputs = before.part == "output"
    assert before[outputs].equals(after[outputs])
    front = report.values["front"]
    assert {"cost", "score", "kind", "error", "label", "predicted", "verified", "configuration"} <= set(front.columns)
    assert front.is_chosen.sum() == 1
    assert set(front.kind) <= {"predicted", "verified", "uniform", "current"}
    assert front.verified[front.kind != "predicted"].notna().all()


def test_front_measures_and_leaves_the_sim_as_it_was_and_its_points_can_be_applied():
    sim, batches = three_layers()
    output, table = sim.output(batches[0]).clone(), sim.to_pandas()
    front = qlab.MixedPrecision(bits=(4, 8), budget=6.0).front(sim, batches)
    assert torch.equal(sim.output(batches[0]), output)
    assert sim.to_pandas().equals(table)
    cheapest = front.points[0]
    cheapest.apply(sim)
    assert [sim[name].weight.bits for name in ("0", "2", "4")] == [4, 4, 4]
    assert "configurations" in repr(front)
    assert "<img" in front._repr_mimebundle_()["text/html"]


def test_what_shares_a_weight_or_reads_one_activation_moves_together():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.tied(self.a(x) + self.b(x))

    sim = qlab.QuantSim(Shared(), torch.randn(2, 6))
    sim.calibrate([torch.randn(16, 6)])
    by_size = {group.name: group for group in groups_of(sim, "size")}
    assert set(by_size) == {"first", "a", "b"}
    assert by_size["first"].work == 36
    by_operations = groups_of(sim, "bit_operations")
    together = [{name for name, part in group.keys if part == "weight"} for group in by_operations]
    assert {"a", "b"} in together
    assert sum(group.work for group in by_operations) == 4 * 36  # the tied weight works twice
    report = qlab.MixedPrecision(bits=(4, 8), budget=6.0, metric="bit_operations").apply(sim, [torch.randn(16, 6)])
    assert sim["a"].weight.bits == sim["b"].weight.bits == sim.input_quantizer(sim.graph["a"]).bits
    assert report.values["cost"] <= report.values["budget"]


def test_multiply_accumulates_are_those_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.Flatten(), nn.Linear(6 * 64, 5),
    )  # fmt: skip
    sim = qlab.QuantSim(model, torch.randn(2, 4, 8, 8))
    counted = [multiply_accumulates(sim.graph[name]) for name in ("0", "1", "3")]
    assert counted == [8 * 16 * 2 * 9, 8 * 16 * 3 * 4, 6 * 64 * 5]


def test_skipped_layers_keep_their_bits():
    sim, batches = three_layers()
    qlab.MixedPrecision(bits=(3, 4), budget=4.0, skip="0, 4").apply(sim, batches)
    assert (sim["0"].weight.bits, sim["4"].weight.bits) == (8, 8)
    assert sim["2"].weight.bits in (3, 4)


def test_what_cannot_be_is_said():
    sim, batches = three_layers()
    with pytest.raises(InputError, match="at least one batch"):
        qlab.MixedPrecision().apply(sim, [])
    with pytest.raises(InputError, match="below the least width, 4"):
        qlab.MixedPrecision(bits=(4, 8), budget=3.0).apply(sim, batches)
    with pytest.raises(InputError, match="nothing to choose"):
        qlab.MixedPrecision(skip="*").apply(sim, batches)
    with pytest.raises(NotCalibrated):
        qlab.MixedPrecision().apply(qlab.QuantSim(nn.Linear(3, 2), torch.randn(2, 3)), [torch.randn(2, 3)])
    for wrong in ((), "eight", (1, 8), (99,)):
        with pytest.raises(SettingError, match="bits"):
            qlab.MixedPrecision(bits=wrong)
    assert qlab.MixedPrecision(bits="8, 4").bits == (4, 8)


def test_at_the_size_of_6_bits_it_beats_6_bits_with_a_fifth_of_the_forwards(monkeypatch):
    digits = qlab.examples.digits()
    calibration, judge = digits.calibration(4), qlab.SQNR(digits.test)
    sim = qlab.QuantSim(qlab.examples.mobilenet(), calibration[0])
    qlab.BatchNormFolding().apply(sim)
    sim.calibrate(calibration)
    uniform = copy.deepcopy(sim)
    uniform.configure("*", weight={"bits": 6})
    uniform_score = uniform.evaluate(judge)
    layers = sum(layer.weight is not None for layer in sim.layers.values())

    work = Images(monkeypatch)
    report = qlab.MixedPrecision(budget=6.0).apply(sim, calibration, score=judge)
    one_by_one = layers * len(qlab.MixedPrecision().bits) * len(digits.test_images)
    assert work.forwards + work.backwards <= one_by_one / 5
    assert report.values["cost"] <= report.values["budget"]
    score = sim.evaluate(judge)
    assert float(score) > float(uniform_score) + 2 * uniform_score.standard_error


def test_widths_too_coarse_for_the_budget_are_said_with_what_one_width_would_reach():
    sim, batches = three_layers()
    uniform = with_bits(sim, (5, 5, 5)).evaluate(qlab.SQNR(batches))
    coarse = qlab.MixedPrecision(bits=(2, 8), budget=5.0).front(sim, batches)
    assert float(coarse.chosen.score) < uniform
    assert any(f"5 bits throughout cost the same and are better, SQNR {uniform} " in note for note in coarse.notes)
    fine = qlab.MixedPrecision(bits=(2, 5, 8), budget=5.0).front(sim, batches)
    assert not any("throughout" in note for note in fine.notes)
    assert float(fine.chosen.score) >= uniform - uniform.standard_error


class Images:
    """Counts the images that pass the network's last layer; a backward counts as two forwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = self.backwards = 0
        linear, grad = nn.functional.linear, torch.autograd.grad

        def counted(x: Tensor, *args, **kwargs) -> Tensor:
            self.forwards += len(x)
            return linear(x, *args, **kwargs)

        def counted_grad(outputs, *args, **kwargs):
            self.backwards += 2 * len(outputs[0])
            return grad(outputs, *args, **kwargs)

        monkeypatch.setattr(nn.functional, "linear", counted)
        monkeypatch.setattr(torch.autograd, "grad", counted_grad)


def test_a_rounding_that_belongs_to_the_bits_in_force_counts_in_the_estimate():
    torch.manual_seed(0)
    sim = qlab.QuantSim(lived(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))), torch.randn(2, 8))
    batches = [torch.randn(64, 8)]
    sim.calibrate(batches)
    for name in ("0", "2"):
        encoding = sim[name].weight.required_encoding()
        sim[name].weight.set_rounding(torch.full_like(sim[name].weight.weight, encoding.qmin))
    front = qlab.MixedPrecision(bits=(6, 8), budget=8.0).front(sim, batches)
    current = next(point for point in front.points if point.kind == "current")
    six = next(point for point in front.points if point.label == "6 bits")
    assert current.predicted < 0 < 20 < six.predicted
