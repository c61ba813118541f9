"""Training through the sim in a user's own loop: gradients, modes, state, and the mistakes that are said."""

import copy
import math

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import NotCalibrated
from qlab.quantization import LearnedRange, Quantizer, QuantSpec, fake_quantize
from qlab.sim.training import TrainingError, collapsed_ranges


def make(preset=None) -> tuple[qlab.QuantSim, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)
    ).eval()
    x = torch.randn(16, 1, 6, 6)
    sim = qlab.QuantSim(model, x, preset or qlab.presets.w4a4())
    sim.calibrate([x])
    return sim, x, torch.randint(0, 3, (16,))


def step(sim, optimizer, x, y) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(sim(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("mode", ["regular", "range_learning"])
def test_the_loss_falls_in_a_plain_loop(mode):
    sim, x, y = make()
    sim.qat(mode)
    sim.train()
    optimizer = torch.optim.Adam(sim.parameters(), lr=5e-3)
    losses = [step(sim, optimizer, x, y) for _ in range(30)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_regular_keeps_activation_grids_and_follows_the_weights():
    sim, x, y = make()
    grids = {n: e.output.encoding for n, e in sim.layers.items() if e.output is not None}
    assert list(sim.range_parameters()) == []
    sim.qat("regular")
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.5)
    weight_grid = sim["0"].weight.encoding
    step(sim, optimizer, x, y)
    assert all(sim[n].output.encoding.equals(e) for n, e in grids.items())
    assert not sim["0"].weight.encoding.equals(weight_grid)
    weight = sim.model[0].weight.detach()
    want = float(max(weight.max() / 7, -weight.min() / 8))
    assert float(sim["0"].weight.encoding.scale) == pytest.approx(want, rel=1e-5)


def test_range_learning_moves_every_range_and_keeps_them_as_frozen_encodings():
    sim, x, y = make()
    before = {id(q): q.encoding for q in sim.quantizers.values()}
    sim.qat("range_learning")
    ranges = list(sim.range_parameters())
    assert len(ranges) == sum(1 if q.learned.low is None else 2 for q in sim.quantizers.values())
    optimizer = torch.optim.Adam(sim.parameters(), lr=1e-2)
    for _ in range(3):
        step(sim, optimizer, x, y)
    moved = [not q.encoding.equals(before[id(q)]) for q in sim.quantizers.values()]
    assert sum(moved) >= len(moved) - 1
    want = sim.output(x)
    sim.qat(None)
    assert list(sim.range_parameters()) == []
    assert all(q.frozen for q in sim.quantizers.values())
    assert torch.equal(sim.output(x), want)
    sim.calibrate([x * 3])
    assert torch.equal(sim.output(x), want)


def test_the_starting_point_of_range_learning_is_the_calibrated_sim():
    sim, x, _ = make()
    want = sim.output(x)
    sim.qat("range_learning")
    assert torch.allclose(sim.output(x), want, atol=1e-5)


@pytest.mark.parametrize("qmin", [0, -8])
def test_gradients_of_the_ends_equal_finite_differences(qmin):
    """Against a surrogate whose rounding error is frozen; everything in float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, dtype=torch.float64) * 2, torch.randn(200, dtype=torch.float64)
    quantizer = Quantizer(QuantSpec(4, "asymmetric" if qmin == 0 else "symmetric"), "x")
    quantizer.observe(x * 0.7)  # some values lie outside
    quantizer.refresh()
    learned = LearnedRange(quantizer.encoding).double()
    learned.high.data = learned.high.data.double()
    if learned.low is not None:
        learned.low.data = learned.low.data.double()
    encoding = learned.encoding()
    (fake_quantize(x, encoding) * weight).sum().backward()
    ends = [p for p in (learned.low, learned.high) if p is not None]
    scale, zero = encoding.scale.detach(), encoding.zero_point.detach()
    levels, exact = torch.round(x / scale), (encoding.qmin - ends[0].detach() / scale if qmin == 0 else zero)
    inside = (levels + zero >= encoding.qmin) & (levels + zero <= encoding.qmax)
    above = levels + zero > encoding.qmax

    def surrogate(*values):
        low, high = values if len(values) == 2 else (torch.zeros_like(values[0]), values[0])
        s = (high - low) / (encoding.qmax - encoding.qmin) if qmin == 0 else high / encoding.qmax
        z = (encoding.qmin - low / s) + (zero - exact) if qmin == 0 else zero
        kept = (levels - x / scale) * s + x
        clipped = torch.where(above, (encoding.qmax - z) * s, (encoding.qmin - z) * s)
        return (torch.where(inside, kept, clipped) * weight).sum()

    for position, end in enumerate(ends):
        numeric = []
        for delta in (1e-6, -1e-6):
            moved = [e.detach().clone() for e in ends]
            moved[position] += delta
            numeric.append(surrogate(*moved))
        want = float((numeric[0] - numeric[1]) / 2e-6)
        assert float(end.grad) == pytest.approx(want, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("axis", [None, 1])
def test_a_range_in_training_passes_the_gradients_of_finite_differences(scheme, axis):
    """In float64, against a surrogate whose rounding errors are frozen; the ends too narrow, so that values clip."""
    torch.manual_seed(0)
    x, weight = torch.randn(60, 3, dtype=torch.float64) * 2 + 0.5, torch.randn(60, 3, dtype=torch.float64)
    quantizer = Quantizer(QuantSpec(4, scheme, "per_tensor" if axis is None else "per_channel"), "x", axis)
    quantizer.observe(x * 0.7)
    quantizer.refresh()
    quantizer.learn_range()
    learned = quantizer.learned
    ends = [end for end in (learned.low, learned.high) if end is not None]
    for end in ends:
        end.data = end.data.double()
    x.requires_grad_()
    (quantizer(x) * weight).sum().backward()
    grid = learned.encoding()
    n, qmin, qmax = grid.qmax - grid.qmin, grid.qmin, grid.qmax
    scale, zero = grid.scale.detach(), grid.zero_point.detach()
    levels = torch.round(x.detach() / scale) + zero
    error = x.detach() / scale - torch.round(x.detach() / scale)

    def surrogate(x_, *moved):
        low, high = moved if len(moved) == 2 else (None, moved[0])
        s = high / qmax if low is None else (high - low) / n
        # what rounding the zero point added stays, as what rounding the values added does
        z = zero if low is None else zero + (qmin - low / s) - (qmin - ends[0].detach() / scale)
        kept = x_ - error * s
        clipped = torch.where(levels > qmax, (qmax - z) * s, (qmin - z) * s)
        return (torch.where((levels < qmin) | (levels > qmax), clipped, kept) * weight).sum()

    values = [x.detach(), *(end.detach() for end in ends)]
    assert bool((levels > qmax).any())
    for position, leaf in enumerate((x, *ends)):
        flat = leaf.grad.flatten()
        for index in range(0, flat.numel(), 7):
            pair = []
            for delta in (1e-6, -1e-6):
                moved = [value.clone() for value in values]
                moved[position].view(-1)[index] += delta
                pair.append(float(surrogate(*moved)))
            assert float(flat[index]) == pytest.approx((pair[0] - pair[1]) / 2e-6, rel=1e-5, abs=1e-5)


def test_a_range_that_is_no_number_gives_no_number_and_no_error():
    sim, x, _ = make()
    sim.qat("range_learning")
    assert {quantizer.learned.symmetric for quantizer in sim.quantizers.values()} == {True, False}
    for quantizer in sim.quantizers.values():
        twin = copy.deepcopy(sim)
        with torch.no_grad():
            for end in next(q for q in twin.quantizers.values() if q.name == quantizer.name).learned.parameters():
                end.fill_(float("nan"))
        assert bool(twin(x).isnan().any())
        assert bool(twin.output(x).isnan().any())


def test_lsq_divides_the_gradients_of_a_range_by_the_root_of_its_elements_and_steps():
    found = []
    for lsq in (False, True):
        sim, x, y = make()
        sim.qat("range_learning", lsq=lsq)
        nn.functional.cross_entropy(sim(x), y).backward()
        found.append(sim)
    plain, scaled = found
    ends = 0
    for name, elements in (("0:weight", 4 * 9), ("5:weight", 144 * 3), ("2:output", x[:, :1].numel() * 4)):
        one, other = (sim.quantizers[name].learned for sim in (plain, scaled))
        qmax = sim.quantizers[name].encoding.qmax  # Esser et al. 2020: g = 1 / sqrt(N Q)
        for mine, want in zip(other.parameters(), one.parameters(), strict=True):
            assert float(mine.grad) == pytest.approx(float(want.grad) / (elements * qmax) ** 0.5, rel=1e-4)
            ends += float(want.grad) != 0
    assert ends >= 3
    moved = [
        (p, q) for (n, p), (_, q) in zip(plain.model.named_parameters(), scaled.model.named_parameters(), strict=True)
    ]
    assert all(torch.equal(p.grad, q.grad) for p, q in moved)


def test_other_bits_in_training_keep_the_parameters_that_the_optimizer_holds_and_the_range():
    sim, x, y = make()
    sim.qat("range_learning")
    optimizer = torch.optim.Adam(sim.parameters(), lr=1e-2)
    step(sim, optimizer, x, y)
    before = {name: (sim[name].output.encoding, list(sim[name].output.learned.parameters())) for name in ("2", "5")}
    snapshot = qlab.Snapshot(sim)
    sim.configure("*", weight={"bits": 3}, output={"bits": 6})
    for name, (grid, parameters) in before.items():
        output = sim[name].output
        assert all(a is b for a, b in zip(output.learned.parameters(), parameters, strict=True))
        assert output.encoding.qmax - output.encoding.qmin == 63
        span, earlier = (float(e.maximum - e.minimum) for e in (output.encoding, grid))
        assert span == pytest.approx(earlier, rel=0.05)
    grids = {name: sim[name].output.encoding for name in before}
    step(sim, optimizer, x, y)
    assert not any(sim[name].output.encoding.equals(grid) for name, grid in grids.items())
    assert sim["5"].weight.quantized().detach().unique().numel() <= 8
    snapshot.restore()
    assert sim["5"].weight.bits == 4
    assert all(sim[name].output.encoding.equals(grid) for name, (grid, _) in before.items())


def test_a_collapsed_or_crossed_range_stays_valid_and_is_named():
    sim, x, _ = make()
    sim.qat("range_learning")
    quantizer = sim["2"].output
    with torch.no_grad():
        quantizer.learned.high.fill_(-1.0)
    encoding = quantizer.encoding
    assert float(encoding.scale) > 0
    assert encoding.qmin <= int(encoding.zero_point) <= encoding.qmax
    assert bool(torch.isfinite(sim.output(x)).all())
    assert collapsed_ranges(sim) == ["2"]


def test_an_optimizer_built_too_early_is_said_at_its_first_step():
    sim, x, y = make()
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.1)
    sim.qat("range_learning")
    with pytest.raises(TrainingError, match=r"built before sim\.qat"):
        step(sim, optimizer, x, y)
    other = torch.optim.SGD(sim.parameters(), lr=0.1)
    step(sim, other, x, y)


def test_a_stranger_s_optimizer_is_left_alone():
    sim, _, _ = make()
    sim.qat("range_learning")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(1)
    optimizer.step()


def test_an_uncalibrated_sim_and_unknown_modes_are_refused():
    sim = qlab.QuantSim(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(NotCalibrated, match="calibrate"):
        sim.qat("regular")
    with pytest.raises(TrainingError, match="regular"):
        make()[0].qat("fast")


def test_state_dict_resumes_training_bit_for_bit():
    sim, x, y = make()
    sim.qat("range_learning")
    optimizer = torch.optim.Adam(sim.parameters(), lr=1e-2)
    step(sim, optimizer, x, y)
    saved, saved_optimizer = copy.deepcopy(sim.state_dict()), copy.deepcopy(optimizer.state_dict())
    step(sim, optimizer, x, y)
    want = sim.output(x)
    other, _, _ = make()
    other.qat("range_learning")
    other.load_state_dict(saved)
    resumed = torch.optim.Adam(other.parameters(), lr=1e-2)
    resumed.load_state_dict(saved_optimizer)
    step(other, resumed, x, y)
    assert torch.equal(other.output(x), want)


def test_gradients_accumulate_and_groups_take_their_own_rate():
    sim, x, y = make()
    sim.qat("range_learning")
    sim.eval()
    nn.functional.cross_entropy(sim(x), y).backward()
    whole = [p.grad.clone() for p in sim.parameters()]
    sim.zero_grad()
    for part in (slice(0, 8), slice(8, 16)):
        (nn.functional.cross_entropy(sim(x[part]), y[part]) / 2).backward()
    assert all(torch.allclose(p.grad, w, atol=1e-5) for p, w in zip(sim.parameters(), whole, strict=True))
    ranges = {id(p) for p in sim.range_parameters()}
    weights = [p for p in sim.parameters() if id(p) not in ranges]
    frozen = [p.detach().clone() for p in sim.range_parameters()]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": list(sim.range_parameters()), "lr": 0.0}], lr=0.1)
    optimizer.step()
    assert all(torch.equal(p, f) for p, f in zip(sim.range_parameters(), frozen, strict=True))


def test_autocast_trains_and_keeps_grids_in_float32():
    sim, x, y = make(qlab.presets.w8a8())
    sim.qat("range_learning")
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(sim(x).float(), y)
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sim.range_parameters())


def test_dropout_is_live_in_training_and_silent_in_eval():
    sim, x, _ = make()
    sim.qat("regular")
    sim.train()
    with torch.no_grad():
        assert not torch.equal(sim(x), sim(x))
        sim.eval()
        assert torch.equal(sim(x), sim(x))


def test_an_earlier_rounding_is_given_up_and_said():
    sim, _, _ = make()
    sim["5"].weight.set_rounding(torch.zeros(3, 144))
    notes = sim.qat("regular")
    assert any("5" in note and "dropped" in note for note in notes)
    assert sim["5"].weight.rounding is None


def test_a_snapshot_taken_in_training_comes_back_with_its_ranges():
    sim, x, y = make()
    sim.qat("range_learning")
    optimizer = torch.optim.Adam(sim.parameters(), lr=1e-1)
    want, snapshot = sim.output(x), qlab.Snapshot(sim)
    step(sim, optimizer, x, y)
    assert not torch.equal(sim.output(x), want)
    snapshot.restore()
    assert torch.equal(sim.output(x), want)
    assert sim.qat_mode == "range_learning"
    step(sim, optimizer, x, y)  # the parameters are still those of the optimizer


@pytest.mark.parametrize("mode", ["regular", "range_learning"])
def test_a_relu_that_rounding_does_as_well_has_the_gradients_of_one_computed_apart(mode):
    sim, x, _ = make()
    sim["2"].output.set_range(0.0, 0.4)  # so that values clip
    sim.qat(mode)
    apart = copy.deepcopy(sim)
    assert sim["2"].output.clamps_at(math.inf)
    relus, found = [], []
    for each in (sim, apart):
        x_ = x.clone().requires_grad_()
        hook = each.model[2].register_forward_hook(lambda *_: relus.append(1))
        value = each.model[1](each.model[0](x_))
        layer, step = each.graph["2"], each.call
        if each is sim:
            rounded = step(layer, (value,), {})
        else:
            rounded = each["2"].output(each.model[2](value))
        hook.remove()
        assert float((rounded.detach() > 0).float().mean()) > 0.1
        (rounded * torch.arange(rounded.numel()).view_as(rounded)).sum().backward()
        found.append([x_.grad, *(p.grad for p in each["2"].output.parameters()), rounded.detach()])
    assert relus == [1]  # of the one apart
    assert all(torch.allclose(mine, want, rtol=1e-5) for mine, want in zip(*found, strict=True))
