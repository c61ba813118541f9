"""The standard errors of an analysis against the spread of resampled data, and against formulas where they exist."""

import copy
import math

import numpy as np
import pytest
import torch

import qlab
from qlab.analysis import units_of
from tests.analysis.small import calibrated, data

LAYER = "left"


@pytest.fixture(scope="module")
def many():
    return data(batches=10, size=30)


@pytest.fixture(scope="module")
def rows(many):
    """The rows of one layer, by mode, with SQNR as the score."""
    analysis = qlab.QuantAnalyzer(estimate=False, layers=LAYER).measure(
        calibrated(qlab.presets.w4a4()), many, qlab.SQNR(many)
    )
    summary = analysis.summary.set_index("mode")
    return {"both": summary.loc["both"]} | {m: analysis.table(m).iloc[0] for m in ("enabled", "disabled")}


@pytest.fixture(scope="module")
def outputs(many):
    """What the model gives for each sample, float and with quantizers switched by hand."""
    sim = calibrated(qlab.presets.w4a4())
    unit = next(unit for unit in units_of(sim) if unit.layer == LAYER)
    found = {"float": torch.cat([sim.float_output(batch) for batch in many])}
    for mode in ("both", "enabled", "disabled"):
        twin = copy.deepcopy(sim)
        for key, quantizer in twin.quantizers.items():
            quantizer.enabled = mode == "both" or (key in unit.quantizers) == (mode == "enabled")
        found[mode] = torch.cat([twin.output(batch) for batch in many])
    return {name: value.double().numpy() for name, value in found.items()}


def sqnr(y, q):
    return 10 * np.log10((y**2).sum() / ((y - q) ** 2).sum())


def bootstrap(value, samples, draws=3000):
    """The standard deviation of `value` over samples drawn with replacement."""
    generator = np.random.default_rng(0)
    return np.std([value(generator.integers(samples, size=samples)) for _ in range(draws)])


@pytest.mark.parametrize("mode", ["enabled", "disabled", "both"])
def test_the_error_of_a_score_is_the_spread_over_other_samples(rows, outputs, mode):
    y, q = outputs["float"], outputs[mode]
    assert rows[mode].score == pytest.approx(sqnr(y, q), abs=1e-4)
    assert rows[mode].error == pytest.approx(bootstrap(lambda i: sqnr(y[i], q[i]), len(y)), rel=0.15)


def test_the_error_of_a_change_is_the_spread_of_the_difference_on_the_same_samples(rows, outputs):
    y, q, both = outputs["float"], outputs["disabled"], outputs["both"]
    row = rows["disabled"]
    assert row.change == pytest.approx(sqnr(y, q) - sqnr(y, both), abs=1e-4)
    spread = bootstrap(lambda i: sqnr(y[i], q[i]) - sqnr(y[i], both[i]), len(y))
    assert row.change_error == pytest.approx(spread, rel=0.15)
    assert row.change_error < math.hypot(row.error, rows["both"].error)


def test_the_error_of_a_mean_divergence_is_that_of_a_mean(rows, outputs):
    def log_softmax(z):
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    p, q = log_softmax(outputs["float"]), log_softmax(outputs["enabled"])
    kl = (np.exp(p) * (p - q)).sum(1)
    assert rows["enabled"].kl == pytest.approx(kl.mean(), rel=1e-4)
    assert rows["enabled"].kl_error == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-4)


def test_the_error_of_a_share_is_that_of_a_binomial(many):
    sim = calibrated(qlab.presets.w4a4())
    row = qlab.QuantAnalyzer(estimate=False, layers=LAYER).measure(sim, many, qlab.Agreement(many)).enabled.iloc[0]
    assert 0 < row.score < 1
    assert row.error == pytest.approx(math.sqrt(row.score * (1 - row.score) / row.samples), rel=1e-9)
