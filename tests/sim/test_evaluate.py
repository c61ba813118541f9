"""Scores: hand-computed numbers, intervals that are right, references that stay the original model."""

import math

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError


def linear_sim() -> tuple[qlab.QuantSim, torch.Tensor]:
    model = nn.Linear(4, 3).eval()
    x = torch.randn(50, 4)
    sim = qlab.QuantSim(model, x)
    sim.calibrate([x])
    return sim, x


def test_accuracy_counts_and_ignores_negative_labels():
    sim, x = linear_sim()
    predicted = sim.output(x).argmax(1)
    labels = predicted.clone()
    labels[:10] = (labels[:10] + 1) % 3
    labels[40:] = -100
    accuracy = sim.evaluate(qlab.Accuracy([(x[:20], labels[:20]), (x[20:], labels[20:])]))
    assert float(accuracy) == 0.75
    assert accuracy.samples == 40
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_sqnr_is_that_of_the_definition_and_infinite_without_quantization():
    sim, x = linear_sim()
    y, q = sim.float_output(x).double(), sim.output(x).double()
    want = 10 * math.log10(float(y.square().sum() / (y - q).square().sum()))
    score = qlab.SQNR([x[:20], x[20:]])
    assert float(sim.evaluate(score)) == pytest.approx(want, abs=1e-6)
    assert sim.evaluate(score, quantized=False) == math.inf
    assert sim.evaluate(score).standard_error > 0


def test_agreement_is_one_in_float_and_the_reference_stays_the_original():
    sim, x = linear_sim()
    agreement = qlab.Agreement([x])
    assert sim.evaluate(agreement, quantized=False) == 1.0
    with torch.no_grad():
        sim.model.weight.neg_()
    assert sim.evaluate(agreement, quantized=False) < 0.9


def test_any_function_of_a_model_is_a_score():
    sim, x = linear_sim()
    seen = []

    def negative_norm(model):
        seen.append(torch.is_grad_enabled())
        return -model(x).norm()

    assert float(sim.evaluate(negative_norm)) < 0
    assert seen == [False]


def test_a_measurement_is_a_number_that_knows_its_interval():
    share = qlab.Measurement(0.9, 0.03, "share", 100)
    assert share > 0.89
    low, high = share.interval
    assert low == pytest.approx(0.8256, abs=1e-4)  # Wilson, computed by hand
    assert high == pytest.approx(0.9448, abs=1e-4)
    assert str(share) == "90.0% (95 %: 82.6% to 94.5%)"


def test_missing_labels_and_empty_batches_say_so():
    sim, x = linear_sim()
    with pytest.raises(InputError, match="labelled batches"):
        sim.evaluate(qlab.Accuracy([x]))
    with pytest.raises(InputError, match="nothing to score"):
        sim.evaluate(qlab.Accuracy([]))
    with pytest.raises(InputError, match="Evaluation or a function"):
        sim.evaluate("accuracy")


@pytest.mark.parametrize("kind", ["accuracy", "agreement", "sqnr"])
def test_batches_scored_apart_add_up_to_the_score_of_all(kind):
    sim, x = linear_sim()
    for quantizer in sim.quantizers.values():
        quantizer.bits = 2
    batches = [(part, torch.arange(len(part)) % 3) for part in x.split(15)]
    score = {"accuracy": qlab.Accuracy, "agreement": qlab.Agreement, "sqnr": qlab.SQNR}[kind](batches)
    whole = sim.evaluate(score)
    rows = [
        score.only(sim, number, batch).tally(sim, 0, batch, sim.output(batch)) for number, batch in enumerate(batches)
    ]
    apart = score.of_tallies(torch.cat(rows))
    assert (float(apart), apart.standard_error) == (float(whole), whole.standard_error)
    assert float(score.value(torch.cat(rows).sum(0))) == pytest.approx(float(whole), abs=1e-12)
    assert len(torch.cat(rows)) == len(x)
