"""AdaRound on whole sims: grids kept, optima found, the paper's form reproduced, and every awkward case."""

import copy
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qlab
from qlab.analysis.moment_store import MomentStore
from qlab.errors import InputError, UnknownLayer
from qlab.quantization import quantize
from qlab.quantization.rounding import RoundingProblem
from tests.techniques.models import NETWORKS, lived
from tests.techniques.rounding import codes, correlated, equal, on_grid, two_layers, weights

METHODS = {
    "auto": qlab.AdaRound(),
    "gram": qlab.AdaRound(method="gram", iterations=100),
    "sgd": qlab.AdaRound(method="sgd", iterations=60),
}


@pytest.fixture(scope="module")
def captured() -> dict[str, tuple[qlab.QuantSim, list[Tensor]]]:
    """Calibrated sims of every kind of layer, W4A8, with their data; tests work on copies."""
    found = {}
    for name, (build, size) in NETWORKS.items():
        torch.manual_seed(0)
        batches = [correlated(16, *size, seed=seed) for seed in range(2)]
        sim = qlab.QuantSim(lived(build()), batches[0], qlab.presets.w4a8())
        sim.calibrate(batches)
        found[name] = sim, batches
    return found


# Grids and kinds of layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_layer_is_rounded_onto_its_grid_and_the_output_gains(captured, name, method, granularity):
    original, batches = captured[name]
    sim = copy.deepcopy(original)
    sim.configure("*", weight={"granularity": granularity})
    noise, exact = qlab.SQNR(batches), copy.deepcopy(sim)
    exact.configure("*", weight={"enabled": False})
    before, most = sim.evaluate(noise), exact.evaluate(noise)
    report = METHODS[method].apply(sim, batches)
    assert [row["layer"] for row in report.rows] == list(weights(sim))
    for layer, weight in weights(sim).items():
        assert weight.rounding is not None, layer
        assert on_grid(weight), layer
        assert weight.frozen
        if method == "sgd":  # hard: the floor of the weight or one above
            encoding = weight.required_encoding()
            scale, zero = encoding.broadcast(weight.weight.shape)
            floor = ((weight.weight.detach() / scale).floor() + zero).clamp(encoding.qmin, encoding.qmax)
            step = weight.rounding - floor
            assert bool(((step == 0) | (step == 1)).all()), layer
    # of what rounding weights had cost
    assert sim.evaluate(noise) - before > (0.4 if method == "sgd" else 0.8) * (most - before)


def test_the_form_of_each_layer_is_the_one_that_suits_it(captured):
    original, batches = captured["images"]
    sim = copy.deepcopy(original)
    forms = {row["layer"]: row["form"] for row in qlab.AdaRound().apply(sim, batches).rows}
    assert forms["3"] == "enumeration"  # depthwise, 3x3
    assert forms["6"] == "enumeration"  # two inputs a group
    assert forms["0"] == forms["16"] == "search"
    wide = nn.Sequential(nn.Linear(700, 1), nn.ReLU(), nn.Linear(1, 1)).eval()
    x = torch.randn(40, 700)
    sim = qlab.QuantSim(wide, x, qlab.presets.w4a8())
    # One output of very many inputs: a few steps on minibatches cost less than a factorization.
    forms = [row["form"] for row in qlab.AdaRound(iterations=10).apply(sim, [x]).rows]
    assert forms == ["sgd", "enumeration"]


@pytest.mark.parametrize("granularity", ["per_block(4)", "per_block(6)"])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_inputs_keep_a_scale_each(granularity, method):
    sim, batches = two_layers()
    sim.configure("0", weight={"granularity": granularity})
    before = sim.evaluate(qlab.SQNR(batches))
    METHODS[method].apply(sim, batches)
    weight = sim["0"].weight
    assert tuple(weight.required_encoding().scale.shape) == (8, 12 // int(granularity[10]))
    assert on_grid(weight)
    assert sim.evaluate(qlab.SQNR(batches)) > before


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "strict_symmetric"])
def test_zero_points_and_strict_grids_are_respected(scheme):
    sim, batches = two_layers()
    sim.configure("*", weight={"scheme": scheme})
    sim.model[0].weight.data += 0.1  # an offset, so that an asymmetric grid has its zero point elsewhere
    sim.calibrate(batches)
    before = sim.evaluate(qlab.SQNR(batches))
    qlab.AdaRound().apply(sim, batches)
    encoding = sim["0"].weight.required_encoding()
    assert encoding.is_symmetric == (scheme != "asymmetric")
    assert on_grid(sim["0"].weight)
    if scheme == "strict_symmetric":
        assert int(sim["0"].weight.rounding.min()) >= -7
    assert sim.evaluate(qlab.SQNR(batches)) > before + 3


# Optima ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_kernel_gets_the_best_of_its_512_roundings_or_better(stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, stride=stride, padding=1, groups=3, bias=False)
    x = correlated(8, 3, 9, 9)
    sim = qlab.QuantSim(nn.Sequential(conv), x, qlab.presets.w4a8())
    sim.calibrate([x])
    qlab.AdaRound(search_scale=False, correct_bias=False, damping=1e-6).apply(sim, [x])
    xh, scale = sim["input"].output(x), float(sim["0"].weight.required_encoding().scale)
    exact, floor = conv(x), (conv.weight / scale).floor()
    best = torch.full((3,), torch.inf)
    for choice in product((0.0, 1.0), repeat=9):
        levels = (floor + torch.tensor(choice).view(1, 1, 3, 3)).clamp(-8, 7)
        y = functional.conv2d(xh, levels * scale, stride=stride, padding=1, groups=3)
        best = torch.minimum(best, (y - exact).square().mean((0, 2, 3)))
    y = functional.conv2d(xh, sim["0"].weight.quantized(), stride=stride, padding=1, groups=3)
    found = (y - exact).square().mean((0, 2, 3))
    assert bool((found <= best * 1.001).all())


@torch.no_grad()
def test_a_layer_makes_up_for_errors_before_it_as_far_as_least_squares_can():
    sim, batches = two_layers(qlab.presets.w8a16())
    sim.configure("0", weight={"bits": 3})
    sim.configure("2", weight={"bits": 16})
    x = torch.cat(batches)
    hidden = sim["1"].output(functional.linear(sim["input"].output(x), sim["0"].weight.quantized(), sim.model[0].bias))
    hidden, exact = hidden.relu().double(), sim.model(x).double()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([hidden, ones], 1), exact).solution
    least = (torch.cat([hidden, ones], 1) @ best - exact).square().mean()
    nearest = (sim.output(x) - exact).square().mean()
    qlab.AdaRound(layers="2", damping=1e-6).apply(sim, batches)
    found = (sim.output(x) - exact).square().mean()
    assert sim["0"].weight.rounding is None
    assert float(nearest) > 1.2 * float(least)
    assert float(found) == pytest.approx(float(least), rel=0.02)


def test_no_layer_is_worse_than_with_nearest_rounding(captured):
    for original, batches in captured.values():
        for settings in ({}, {"search_scale": False}, {"correct_bias": False}):
            report = qlab.AdaRound(**settings).apply(copy.deepcopy(original), batches)
            assert all(row["sqnr_after"] > row["sqnr_before"] for row in report.rows)


@torch.no_grad()
def test_the_reported_gain_is_that_of_the_values():
    sim, batches = two_layers()
    x = torch.cat(batches)

    def measured() -> float:
        exact = functional.linear(x, sim.model[0].weight)
        weight, bias = sim["0"].weight.quantized(), sim["0"].weight.bias_correction
        wrong = functional.linear(sim["input"].output(x), weight, bias) - exact
        return 10 * float((exact.square().mean() / wrong.square().mean()).log10())

    before = measured()
    report = qlab.AdaRound().apply(sim, batches)
    assert report.rows[0]["sqnr_before"] == pytest.approx(before, abs=0.01)
    assert report.rows[0]["sqnr_after"] == pytest.approx(measured(), abs=0.01)
    gains = [row["sqnr_after"] - row["sqnr_before"] for row in report.rows]
    assert report.values["gain_db"] == pytest.approx(sum(gains) / 2)
    assert sum(report.values["forms"].values()) == 2


@torch.no_grad()
def test_the_mean_error_goes_into_a_correction_and_not_into_the_float_model():
    sim, batches = two_layers()
    x, float_bias = torch.cat(batches), sim.model[0].bias.clone()
    plain = copy.deepcopy(sim)
    qlab.AdaRound(correct_bias=False).apply(plain, batches)
    qlab.AdaRound().apply(sim, batches)
    assert torch.equal(sim.model[0].bias, float_bias)
    assert plain["0"].weight.bias_correction is None
    for of, most in ((sim, 1e-5), (plain, 1.0)):
        weight = of["0"].weight
        y = functional.linear(of["input"].output(x), weight.quantized(), weight.bias_correction)
        wrong = (y - functional.linear(x, of.model[0].weight)).mean(0).abs().max()
        assert float(wrong) < most
    assert float(wrong) > 1e-3  # without it there was a mean error


# The paper's form -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(weight: Tensor, bias: Tensor, scale: float, x: Tensor, wanted: Tensor, steps: int) -> Tensor:
    """AdaRound of a linear layer with ReLU as its paper writes it, in float64: gradients by hand and Adam."""
    weight, bias, x, wanted = weight.double(), bias.double(), x.double(), wanted.double()
    floor = (weight / scale).floor().clamp(-8, 7)
    fraction = (weight / scale - floor).clamp(0, 1 - 1e-6)
    v = -torch.log(1.2 / (fraction + 0.1) - 1)
    first, second, generator = torch.zeros_like(v), torch.zeros_like(v), torch.Generator().manual_seed(0)
    warm = 0.2 * steps
    for step in range(steps):
        drawn = torch.randint(len(x), (32,), generator=generator)
        sigmoid = 1 / (1 + torch.exp(-v))
        h = (1.2 * sigmoid - 0.1).clamp(0, 1)
        slope = 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        levels = floor + h
        y = x[drawn] @ (levels.clamp(-8, 7) * scale).t() + bias
        # d/dW of the mean over samples of the squared error, summed over outputs, after the ReLU
        wrong = 2 * (y.clamp_min(0) - wanted[drawn]) * (y > 0) / 32
        gradient = (wrong.t() @ x[drawn]) * scale * (levels <= 7)
        if step >= warm:
            beta = 2 + 9 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm)))).item()
            centred = 2 * h - 1
            gradient -= 0.01 * 2 * beta * centred.abs() ** (beta - 1) * centred.sign()
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        v -= 1e-3 * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return (floor + (v >= 0)).clamp(-8, 7)


def test_the_paper_s_form_gives_the_integers_of_the_paper_written_by_hand():
    sim, batches = two_layers()
    x = torch.cat(batches)
    with torch.no_grad():
        xh, wanted = sim["input"].output(x), sim.model[:2](x)
    weight, scale = sim["0"].weight, float(sim["0"].weight.required_encoding().scale)
    wanted_levels = by_hand(weight.weight.detach(), sim.model[0].bias.detach(), scale, xh, wanted, 1500)
    nearest = quantize(weight.weight, weight.required_encoding())
    sgd = qlab.AdaRound(method="sgd", iterations=1500, layers="0", search_scale=False, correct_bias=False)
    sgd.apply(sim, batches)
    assert int((wanted_levels != nearest).sum()) > 5  # there was something to learn
    assert torch.equal(weight.rounding.double(), wanted_levels)


def test_outputs_that_the_activation_function_takes_away_are_not_rounded_for():
    sim, batches = two_layers(bias=-50.0)  # the first output never passes the ReLU
    twin = copy.deepcopy(sim)
    settings = {"layers": "0", "search_scale": False, "correct_bias": False}
    qlab.AdaRound(method="sgd", iterations=1500, **settings).apply(sim, batches)
    qlab.AdaRound(method="gram", iterations=300, **settings).apply(twin, batches)
    weight = sim["0"].weight
    nearest = quantize(weight.weight, weight.required_encoding())
    assert torch.equal(weight.rounding[0], nearest[0])
    assert not torch.equal(weight.rounding[1:], nearest[1:])
    assert not torch.equal(twin["0"].weight.rounding[0], nearest[0])  # second moments know nothing of the ReLU


@pytest.mark.parametrize("method", METHODS)
def test_results_are_those_of_the_seed(captured, method):
    original, batches = captured["images"]
    found = []
    for seed in (0, 0, 1):
        sim = copy.deepcopy(original)
        replace(METHODS[method], seed=seed, layers=("0", "6"), max_rows=300).apply(sim, batches)
        found.append({name: sim[name].weight.rounding for name in ("0", "6")})
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


# Afterwards -----------------------------------------------------------------------------------------------------------


def test_other_bits_are_rounded_again_without_data_as_with_data(monkeypatch):
    sim, batches = two_layers()
    fresh = copy.deepcopy(sim)
    qlab.AdaRound().apply(sim, batches)
    kept = sim["2"].weight.rounding
    sim.configure("0", weight={"bits": 3, "granularity": "per_channel"})
    fresh.configure("0", weight={"bits": 3, "granularity": "per_channel"})
    assert sim["0"].weight.rounding is None  # the old integers belong to another grid
    passes: list[int] = []
    monkeypatch.setattr(type(sim.graph), "run", lambda *a, **k: passes.append(1))
    monkeypatch.setattr("qlab.techniques.layer_rounding.stream", lambda *a, **k: passes.append(1))
    report = qlab.AdaRound().apply(sim)
    monkeypatch.undo()
    assert not passes
    assert [row["layer"] for row in report.rows] == ["0"]
    assert any("without data" in note for note in report.notes)
    assert torch.equal(sim["2"].weight.rounding, kept)
    qlab.AdaRound().apply(fresh, batches)
    assert torch.equal(sim["0"].weight.rounding, fresh["0"].weight.rounding)
    assert qlab.AdaRound().apply(sim).summary == "every rounding is in force: nothing to do"


def test_after_coarse_layers_have_become_fine_nothing_is_made_up_for_that_is_gone(captured, monkeypatch):
    original, batches = captured["sequences"]
    sim, noise = copy.deepcopy(original), qlab.SQNR(batches)
    sim.configure("*", weight={"bits": 2})
    qlab.AdaRound().apply(sim, batches)
    sim.configure("*", weight={"bits": 8})
    nearest, stale = sim.evaluate(noise), copy.deepcopy(sim)
    report = qlab.AdaRound().apply(sim)
    assert sim.evaluate(noise) > nearest
    assert any("rounded otherwise since" in note and "3, 6" in note for note in report.notes)
    monkeypatch.setattr(MomentStore, "are_of", lambda *names: True)  # as if nothing had changed before
    qlab.AdaRound().apply(stale)
    assert stale.evaluate(noise) < nearest - 3


def test_changed_weights_end_a_rounding_and_ask_for_data():
    sim, batches = two_layers()
    qlab.AdaRound().apply(sim, batches)
    with torch.no_grad():
        sim.model[0].weight.mul_(1.1)
    assert sim["0"].weight.rounding is None
    with pytest.raises(InputError, match="no moments are kept of '0'"):
        qlab.AdaRound().apply(sim)
    with torch.no_grad():
        sim.model[2].weight.mul_(1.1)
    assert len(qlab.AdaRound().apply(sim, batches).rows) == 2
    assert on_grid(sim["0"].weight)


def test_a_frozen_grid_stays_as_it_is():
    sim, batches = two_layers()
    sim["0"].weight.freeze()
    scale = sim["0"].weight.required_encoding().scale.clone()
    report = qlab.AdaRound().apply(sim, batches)
    assert torch.equal(sim["0"].weight.required_encoding().scale, scale)
    assert report.rows[0]["scale"] == 1
    assert qlab.AdaRound().apply(two_layers()[0], batches).rows[0]["scale"] != 1
    sim["0"].weight.bits = 3
    qlab.AdaRound().apply(sim)
    assert sim["0"].weight.bits == 3


def test_only_the_layers_asked_for_are_rounded():
    sim, batches = two_layers()
    sim["2"].weight.bits = 8
    report = qlab.AdaRound(layers="2").apply(sim, batches)
    assert [(row["layer"], row["bits"]) for row in report.rows] == [("2", 8)]
    assert sim["0"].weight.rounding is None
    assert sim["2"].weight.rounding.abs().max() > 100  # its own bits
    with pytest.raises(UnknownLayer, match="matches no layer"):
        qlab.AdaRound(layers=("0", "nosuch*")).apply(sim, batches)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_little_memory_changes_nothing_but_what_is_kept(captured):
    original, _ = captured["images"]
    batches = [correlated(150, 3, 8, 8, seed=seed) for seed in range(3)]  # 2.2 MB of live values each
    whole, bounded = copy.deepcopy(original), copy.deepcopy(original)
    settings = {"layers": ("0", "3", "6")}
    qlab.AdaRound(**settings).apply(whole, batches)
    qlab.AdaRound(**settings, memory=1).apply(bounded, batches)
    for name in settings["layers"]:
        assert torch.equal(whole[name].weight.rounding, bounded[name].weight.rounding)
    assert MomentStore.of(bounded).bytes <= 1 << 20


def test_a_layer_whose_moments_have_no_room_is_trained_or_left_to_the_nearest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 4), nn.ReLU(), nn.Linear(4, 3)).eval()  # 32 * 300^2 bytes: 2.7 MiB
    model[0].weight.data[0, 0] = 0.2  # a long tail
    x = correlated(100, 300)
    sim = qlab.QuantSim(model, x, qlab.presets.w4a8())
    sim.calibrate([x])
    twin = copy.deepcopy(sim)
    rows = qlab.AdaRound(memory=1, iterations=200).apply(sim, [x]).rows
    assert [row["form"] for row in rows] == ["sgd", "enumeration"]
    assert rows[0]["sqnr_after"] > rows[0]["sqnr_before"] + 0.5
    assert rows[0]["scale"] < 1  # a narrower grid is looked for without moments as well
    rows = qlab.GPTQ(memory=1).apply(twin, [x]).rows
    assert [row["form"] for row in rows] == ["too large: to nearest", "columns"]
    assert twin["0"].weight.rounding is None


def test_rows_beyond_those_asked_for_are_sampled(captured):
    original, batches = captured["images"]
    sims = [copy.deepcopy(original) for _ in range(2)]
    for sim, rows in zip(sims, (16384, 200), strict=True):
        qlab.AdaRound(max_rows=rows).apply(sim, batches)
    assert not equal(codes(sims[0]), codes(sims[1]))
    whole, part = (sim.evaluate(qlab.SQNR(batches)) for sim in sims)
    assert part > original.evaluate(qlab.SQNR(batches)) + 2
    assert part > whole - 1


# Bad input ------------------------------------------------------------------------------------------------------------


def test_missing_data_is_said():
    sim, batches = two_layers()
    with pytest.raises(InputError, match="no moments are kept of '0' and 1 more layers"):
        qlab.AdaRound().apply(sim)
    with pytest.raises(InputError, match=r"method='sgd'\) needs data"):
        qlab.AdaRound(method="sgd").apply(sim)
    for nothing in ([], [batches[0][:0]]):
        with pytest.raises(InputError, match="no batch reaches layer '0'"):
            qlab.AdaRound().apply(sim, nothing)
    assert codes(sim) == {"0": None, "2": None}


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_always_zero_or_always_the_same_leave_no_trace(method):
    sim, batches = two_layers()
    batches = [x.clone() for x in batches]
    for x in batches:
        x[:, :3] = 0.0  # dead: G has rows of zeros
        x[:, 3] = x[:, 4]  # twins: G is singular
    sim.calibrate(batches)
    before = sim.evaluate(qlab.SQNR(batches))
    replace(METHODS[method], iterations=400).apply(sim, batches)
    weight = sim["0"].weight
    assert on_grid(weight)
    assert sim.evaluate(qlab.SQNR(batches)) > before
    off = (weight.quantized() - weight.weight).detach()[:, :3].abs().max()
    assert float(off) < 1.01 * float(weight.required_encoding().scale)  # dead inputs keep their weights


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_weights_stay_zero_and_dead_layers_do_no_harm(method):
    sim, batches = two_layers()
    with torch.no_grad():
        sim.model[0].weight.zero_()
        sim.model[0].bias.fill_(-1.0)  # the ReLU lets nothing pass: the second layer sees zeros only
    sim.calibrate(batches)
    METHODS[method].apply(sim, batches)
    assert not sim["0"].weight.quantized().any()
    assert torch.isfinite(sim.output(batches[0])).all()
    assert torch.allclose(sim.output(batches[0]), sim.model[2].bias, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 16])
def test_the_fewest_and_the_most_bits(bits, method):
    sim, batches = two_layers(qlab.presets.w8a16())
    sim.configure("*", weight={"bits": bits})
    noise = qlab.SQNR(batches)
    before = sim.evaluate(noise)
    METHODS[method].apply(sim, batches)
    assert all(on_grid(weight) for weight in weights(sim).values())
    after = sim.evaluate(noise)
    assert after > before + 1 if bits == 2 else after > 60


def test_what_cannot_be_rounded_is_listed_with_the_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6)
            self.shared = nn.Linear(6, 6)
            self.skipped = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.skipped(self.shared(self.shared(self.table(tokens)).relu()).relu()))

    tokens = torch.randint(9, (8, 5))
    sim = qlab.QuantSim(Odd(), tokens, qlab.presets.w4a8())
    sim.configure("skipped", weight={"enabled": False})
    sim.calibrate([tokens])
    report = qlab.AdaRound().apply(sim, [tokens])
    assert {row["layer"] for row in report.rows} == {"shared", "head"}
    assert any("not quantized: skipped" in note for note in report.notes)
    assert any("no product" in note and "table" in note for note in report.notes)
    assert any("the weight of a layer before them" in note for note in report.notes)
    assert sim["shared"].weight.bias_correction is None  # one bias for two places
    sim.configure("*", weight={"enabled": False})
    report = qlab.AdaRound().apply(sim, [tokens])
    assert report.summary == "no layer has a quantized weight that can be rounded"


# Against the paper ----------------------------------------------------------------------------------------------------


def test_the_fast_form_is_no_worse_than_many_steps_on_minibatches_in_a_small_part_of_the_time():
    digits = qlab.examples.digits()
    batches = digits.calibration(4)
    sim = qlab.QuantSim(qlab.examples.mobilenet(), batches[0], qlab.presets.w4a8())
    qlab.BatchNormFolding().apply(sim)
    layers = [layer for layer in weights(sim) if layer.startswith("blocks.3.")]
    sim.configure("*", weight={"enabled": False})
    for layer in layers:
        sim[layer].weight.enabled = True
    sim.calibrate(batches)
    steps, test = 1500, digits.test_images[:200]
    with torch.no_grad():
        exact = sim.model(test)
    errors, seconds = [], []
    for technique in (qlab.AdaRound(), qlab.AdaRound(method="sgd", iterations=steps)):
        twin, start = copy.deepcopy(sim), time.process_time()
        report = technique.apply(twin, batches)
        seconds.append(time.process_time() - start)
        assert len(report.rows) == len(layers) == 3
        errors.append(float((twin.output(test) - exact).norm() / exact.norm()))
    assert errors[0] < 1.05 * errors[1]
    assert seconds[0] < seconds[1] / 30 * (10_000 / steps)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block(4)"])
@pytest.mark.parametrize(
    "technique", [qlab.AdaRound(), qlab.AdaRound(method="gram", iterations=60), qlab.GPTQ(), qlab.SequentialMSE()]
)
def test_a_layer_taken_in_parts_is_rounded_as_one_taken_whole(technique, granularity, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 7)).eval()
    x = torch.randn(200, 12)
    whole = qlab.QuantSim(model, x, qlab.presets.w4a8())
    whole.configure("*", weight={"bits": 3, "granularity": granularity})
    whole.calibrate([x])
    parts = copy.deepcopy(whole)
    seen: list[int] = []
    technique.apply(whole, [x])
    with monkeypatch.context() as narrow:
        narrow.setattr("qlab.techniques.rounding_task._BYTES_AN_ENTRY", (2048 << 20) // 100)  # 8 rows of 12, 3 of 30
        narrow.setattr(
            "qlab.techniques.rounding_task.RoundingProblem",
            lambda target, *rest: (seen.append(target.shape[1]), RoundingProblem(target, *rest))[1],
        )
        report = technique.apply(parts, [x])
    assert max(seen) == 8
    for name in ("0", "2"):
        one, other = (sim[name].weight for sim in (whole, parts))
        assert torch.allclose(one.encoding.scale, other.encoding.scale)
        same = (one.quantized() - other.quantized()).abs() < 1e-6
        assert float(same.float().mean()) > 0.995  # sums in another order may tip a tie
    assert len(report.rows) == 2


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), nn.Conv1d(3, 10, 2)])
def test_training_in_parts_is_training_whole(layer, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU()) if isinstance(layer, nn.Linear) else nn.Sequential(layer)
    x = torch.randn(100, *((6,) if isinstance(layer, nn.Linear) else (3, 8)))
    whole = qlab.QuantSim(model.eval(), x, qlab.presets.w4a8())
    whole.configure("*", weight={"bits": 3, "granularity": "per_channel"})
    whole.calibrate([x])
    parts, steps = copy.deepcopy(whole), []
    technique = qlab.AdaRound(method="sgd", iterations=200)
    technique.apply(whole, [x])
    monkeypatch.setattr("qlab.techniques.rounding_task._BYTES_AN_ENTRY", (2048 << 20) // 18)  # 3 rows of 6
    shape = qlab.quantization.rounding.SoftRounding.share
    monkeypatch.setattr(
        qlab.quantization.rounding.SoftRounding, "share", staticmethod(lambda v: (steps.append(len(v)), shape(v))[1])
    )
    technique.apply(parts, [x])
    assert set(steps) == {3, 1}
    name = next(name for name, found in whole.layers.items() if found.weight is not None)
    assert whole[name].weight.rounding.float().std() > 0
    assert torch.equal(whole[name].weight.rounding, parts[name].weight.rounding)
    assert torch.allclose(whole(x), parts(x), atol=1e-6)
