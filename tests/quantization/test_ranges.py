"""Range rules against hand-computed numbers and brute force."""

import pytest
import torch

from qlab.quantization import QuantSpec, Sample, Statistics, encoding_of_range, find_encoding

SCHEMES = ["asymmetric", "symmetric", "strict_symmetric", "unsigned_symmetric"]


def sample_of(x: torch.Tensor) -> Sample:
    statistics = Statistics()
    statistics.update(x)
    return statistics.sample()


@pytest.mark.parametrize(
    ("scheme", "low", "high", "scale", "zero_point", "limits"),
    [
        ("asymmetric", -1.0, 4.1, 0.02, 50, (0, 255)),
        ("asymmetric", 1.0, 5.1, 0.02, 0, (0, 255)),  # 0 is forced inside
        ("symmetric", -1.27, 1.0, 1.27 / 128, 0, (-128, 127)),
        ("symmetric", -1.0, 1.27, 0.01, 0, (-128, 127)),
        ("strict_symmetric", -1.27, 1.0, 0.01, 0, (-127, 127)),
        ("unsigned_symmetric", 0.0, 2.55, 0.01, 0, (0, 255)),
        ("unsigned_symmetric", -0.1, 1.27, 0.01, 0, (-128, 127)),
    ],
)
def test_the_grid_of_a_range_is_the_one_computed_by_hand(scheme, low, high, scale, zero_point, limits):
    encoding = encoding_of_range(torch.tensor([low]), torch.tensor([high]), QuantSpec(8, scheme))
    assert float(encoding.scale) == pytest.approx(scale, rel=1e-6)
    assert int(encoding.zero_point) == zero_point
    assert (encoding.qmin, encoding.qmax) == limits


def test_a_constant_tensor_has_the_smallest_scale():
    for scheme in SCHEMES:
        encoding = find_encoding(sample_of(torch.zeros(10)), QuantSpec(8, scheme))
        assert float(encoding.scale) == pytest.approx(1.2e-7)


def test_zero_is_always_on_the_grid():
    for scheme in SCHEMES:
        for low, high in ((-3.0, -1.0), (0.3, 7.0), (-0.01, 5.0)):
            encoding = encoding_of_range(torch.tensor([low]), torch.tensor([high]), QuantSpec(5, scheme))
            assert encoding.qmin <= int(encoding.zero_point) <= encoding.qmax


def test_min_max_is_that_of_the_data():
    x = torch.randn(1000)
    encoding = find_encoding(sample_of(x), QuantSpec(8))
    assert float(encoding.scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-6)


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9])
def test_percentile_is_that_of_the_values(p):
    x = torch.randn(200_00)
    spec = QuantSpec(8, rule=f"percentile({p})")
    encoding = find_encoding(sample_of(x), spec)
    low, high = torch.quantile(x, torch.tensor([1 - p / 100, p / 100])).tolist()
    assert float(encoding.scale) * 255 == pytest.approx(high - low, rel=0.01)
    exact = find_encoding(Sample.of_rows(x[None, :2000]), spec)
    low, high = torch.quantile(x[:2000], torch.tensor([1 - p / 100, p / 100])).tolist()
    assert float(exact.scale) * 255 == pytest.approx(high - low, rel=1e-3)


def error(x: torch.Tensor, encoding) -> float:
    levels = torch.round(x / encoding.scale) + encoding.zero_point
    kept = levels.clamp(encoding.qmin, encoding.qmax)
    return float(((kept - encoding.zero_point) * encoding.scale - x).double().square().mean())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_is_within_one_percent_of_the_best_range_by_brute_force(scheme, bits):
    torch.manual_seed(bits)
    x = torch.cat([torch.randn(5000), torch.randn(50) * 6 + 2])
    spec = QuantSpec(bits, scheme, rule="mse")
    chosen = error(x, find_encoding(sample_of(x), spec))
    best = min(
        error(x, encoding_of_range(torch.tensor([low]), torch.tensor([high]), spec))
        for low in torch.linspace(float(x.min()), 0, 50).tolist()
        for high in torch.linspace(0.05, float(x.max()), 100).tolist()
    )
    assert chosen <= 1.01 * best


def test_sqnr_clips_less_than_mse():
    x = torch.cat([torch.randn(5000), torch.tensor([30.0, -30.0])])
    spans = {}
    for rule in ("min_max", "sqnr", "mse"):
        encoding = find_encoding(sample_of(x), QuantSpec(4, "symmetric", rule=rule))
        spans[rule] = float(encoding.scale)
    assert spans["mse"] <= spans["sqnr"] <= spans["min_max"]
    assert spans["mse"] < spans["min_max"]


def test_entropy_ignores_a_lone_outlier_and_keeps_a_uniform_range():
    x = torch.cat([torch.randn(20000), torch.tensor([100.0])])
    assert float(find_encoding(sample_of(x), QuantSpec(8, "symmetric", rule="entropy")).maximum) < 20
    uniform = torch.rand(20000) * 2 - 1
    assert float(find_encoding(sample_of(uniform), QuantSpec(8, "symmetric", rule="entropy")).maximum) > 0.9


@pytest.mark.parametrize("rule", ["min_max", "percentile", "mse", "sqnr", "entropy"])
def test_channels_together_equal_each_channel_alone(rule):
    x = torch.randn(5, 300) * torch.tensor([0.1, 1, 5, 20, 0.01])[:, None]
    spec = QuantSpec(4, "symmetric", "per_channel", rule)
    together = find_encoding(Sample.of_rows(x), spec, axis=0)
    alone = [find_encoding(Sample.of_rows(row[None]), spec) for row in x]
    assert torch.allclose(together.scale, torch.stack([e.scale for e in alone]), rtol=1e-5)


def test_a_known_range_wins_over_the_rule():
    encoding = find_encoding(sample_of(torch.randn(100) * 9), QuantSpec(8, rule="mse", known_range=(0, 1)))
    assert float(encoding.scale) == pytest.approx(1 / 255)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "strict_symmetric", "unsigned_symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_one_grid_is_that_of_a_single_channel_bit_for_bit(scheme, bits):
    """A tensor's one grid is computed with numbers, grids of channels with tensors."""
    spec = QuantSpec(bits, scheme)
    generator = torch.Generator().manual_seed(bits)
    ends = torch.randn(300, 2, generator=generator) * 10 ** torch.empty(300, 1).uniform_(-9, 5, generator=generator)
    ends[:3] = torch.tensor([[0.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])
    for low, high in ends.sort(1).values:
        one = encoding_of_range(low[None], high[None], spec)
        each = encoding_of_range(low[None], high[None], spec, axis=0)
        assert (one.qmin, one.qmax) == (each.qmin, each.qmax)
        assert one.scale.dim() == one.zero_point.dim() == 0
        assert torch.equal(one.scale, each.scale[0])
        assert torch.equal(one.zero_point, each.zero_point[0])
