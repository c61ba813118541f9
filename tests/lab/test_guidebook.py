"""The guidebook decides by what it measured, changes nothing by itself, and its remedies are steps of the lab."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import Cancelled, HistoryError, InputError
from qlab.lab.guidebook_steps import STEPS
from qlab.quantization import WeightQuantizer

from .conftest import differing, state_of


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 6, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def rescaled(batches: list[Tensor]) -> qlab.QuantSim:
    """Channels of its weights differ by orders of magnitude; equalization mends that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    hard = qlab.examples.rescale(model, spread=(1e-3, 1e3), seed=0)
    sim = qlab.QuantSim(hard, batches[0], qlab.presets.w8a8())
    sim.calibrate(batches)
    return sim


@pytest.fixture
def lab(rescaled: qlab.QuantSim, batches: list[Tensor]) -> qlab.Lab:
    return qlab.Lab(copy.deepcopy(rescaled), batches)


def test_it_leads_a_rescaled_network_to_equalization_and_ends_at_the_goal(lab):
    guide = qlab.guidebook(lab)
    assert [guide.step().key for _ in range(3)] == ["sanity", "parts", "channels"]
    assert guide.findings[-1].remedies[0].arguments["technique"] == "CrossLayerEqualization"
    guide.apply()
    assert lab.step == 1
    assert "CrossLayerEqualization" in lab.script()
    last = guide.step()
    assert (last.key, last.next, guide.offered) == ("verdict", None, None)
    assert float(lab.sim.evaluate(qlab.SQNR(lab.batches))) > 20
    assert "The goal is reached" in last.conclusion
    with pytest.raises(HistoryError, match="at its end"):
        guide.step()


def test_its_numbers_are_those_of_the_sim(lab, batches):
    guide = qlab.guidebook(lab)
    guide.step()
    rows = guide.step().evidence.set_index("tried").sqnr
    noise = qlab.SQNR(batches)
    assert rows["as set"] == pytest.approx(float(lab.sim.evaluate(noise)), abs=1e-9)
    for part in ("weights", "activations"):
        twin = copy.deepcopy(lab.sim)
        for quantizer in twin.quantizers.values():
            quantizer.enabled = isinstance(quantizer, WeightQuantizer) == (part == "weights")
        assert rows[f"{part} alone"] == pytest.approx(float(twin.evaluate(noise)), abs=1e-9)


@pytest.mark.parametrize("key", STEPS)
def test_looking_changes_nothing(lab, key):
    before = state_of(lab.sim)
    guide = qlab.guidebook(lab)
    found = guide.step(key)
    assert found.key == key
    assert len(found.evidence) > 0
    assert not differing(before, state_of(lab.sim))
    assert lab.step == 0


def test_a_good_sim_is_left_alone(batches):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    lab = qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)
    guide = qlab.guidebook(lab)
    found = guide.step()
    assert (found.next, found.remedies) == (None, ())
    assert "good enough" in found.conclusion


def test_where_activations_cost_it_goes_to_the_ranges_and_ranks_the_rules_as_they_are(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    lab = qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)
    lab.configure("*", weight={"enabled": False}, output={"bits": 3})
    guide = qlab.guidebook(lab)
    assert [guide.step().key for _ in range(3)] == ["sanity", "parts", "ranges"]
    noise = qlab.SQNR(batches)
    now, gains = float(lab.sim.evaluate(noise)), {}
    for rule in ("percentile", "mse", "sqnr", "entropy"):
        twin = copy.deepcopy(lab.sim)
        twin.configure("*", output={"rule": rule})
        gains[rule] = float(twin.evaluate(noise)) - now
    wanted = sorted((rule for rule in gains if gains[rule] > 0.5), key=gains.get, reverse=True)
    remedies = guide.findings[-1].remedies
    assert [fix.arguments["output"]["rule"] for fix in remedies] == wanted != []
    assert remedies[0].predicted_gain == pytest.approx(gains[wanted[0]], abs=1e-9)


def test_the_goal_is_the_float_score_of_the_first_step_less_the_drop_allowed(network, batches):
    images = [torch.randn(16, 3, 8, 8)]
    labelled = [(images[0], network(images[0]).argmax(1))]
    sim = qlab.QuantSim(network, images[0], qlab.presets.w8a8())
    sim.calibrate(images)
    sim["fc"].weight.bits = 2
    lab = qlab.Lab(sim, images, score=qlab.Accuracy(labelled))
    got = float(sim.evaluate(qlab.Accuracy(labelled)))
    assert got < 1.0  # the float model is right by construction
    enough, short = qlab.guidebook(lab, allowed_drop=1.0 - got), qlab.guidebook(lab, allowed_drop=0.99 - got)
    assert enough.step().next is None
    assert short.step().next == "parts"


def test_a_cancelled_step_finds_nothing(lab):
    guide = qlab.guidebook(lab)
    lab.events.job_started.connect(lambda job: job.cancel())
    with pytest.raises(Cancelled):
        guide.step()
    assert guide.findings == []


def test_what_it_cannot_do_it_says(lab):
    guide = qlab.guidebook(lab)
    with pytest.raises(InputError, match="Did you mean 'ranges'"):
        guide.step("range")
    with pytest.raises(InputError, match="has 0 remedies"):
        guide.apply()
    with pytest.raises(InputError, match="allowed_drop"):
        qlab.guidebook(lab, allowed_drop=-1)


def test_it_reads_as_text(lab):
    guide = qlab.guidebook(lab)
    found = guide.step()
    assert repr(guide) == "Guidebook(1 steps taken, next: Weights or activations?)"
    assert "16 bits everywhere" in repr(found)
    assert math.isinf(found.evidence.sqnr[0])
