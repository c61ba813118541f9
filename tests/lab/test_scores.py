"""Scores: true in the state they are shown for, marked stale in any other, and measured while edits go on."""

import math
import threading
import time

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.lab import JobState


def test_scores_are_those_of_a_full_run(lab: qlab.Lab, batches: list[Tensor], labelled: list) -> None:
    lab.set("*", "weight", bits=3)
    lab.set("relu", "output", bits=4)
    scores = lab.scores
    wanted, found = ([run(batch) for batch in batches[:2]] for run in (lab.sim.float_output, lab.sim.output))
    signal = sum(float(w.double().square().sum()) for w in wanted)
    noise = sum(float((w.double() - f.double()).square().sum()) for w, f in zip(wanted, found, strict=True))
    agree = torch.cat([(w.argmax(1) == f.argmax(1)).double() for w, f in zip(wanted, found, strict=True)])
    right = torch.cat([(lab.sim.output(x).argmax(1) == y).double() for x, y in labelled])
    exact = torch.cat([(lab.sim.float_output(x).argmax(1) == y).double() for x, y in labelled])
    assert scores["sqnr"].quantized == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert scores["agreement"].quantized == pytest.approx(float(agree.mean()))
    assert scores["score"].quantized == pytest.approx(float(right.mean()))
    assert scores["score"].float_value == pytest.approx(float(exact.mean()))
    assert scores["score"].change == pytest.approx(float(right.mean() - exact.mean()))
    assert scores["agreement"].float_value == 1.0
    assert scores["sqnr"].change is None


def test_scores_belong_to_a_state_and_are_stale_in_another(lab: qlab.Lab) -> None:
    assert lab.scores_are_stale
    assert lab.known_scores["score"].quantized is None
    before = lab.scores
    assert not lab.scores_are_stale
    lab.set("fc", "weight", bits=2)
    assert lab.scores_are_stale
    known = lab.known_scores
    assert known.are_stale
    assert known["sqnr"].quantized == before["sqnr"].quantized
    assert lab.scores["sqnr"].quantized < before["sqnr"].quantized
    assert not lab.scores_are_stale


def test_only_what_an_edit_reaches_is_computed_again(lab: qlab.Lab) -> None:
    lab.measure().result(timeout_s=20)
    calls: list[str] = []
    original = lab.sim.call

    def count(layer, args, kwargs):
        calls.append(layer.name)
        return original(layer, args, kwargs)

    lab.sim.__dict__["call"] = count
    lab.set("fc", "weight", bits=4)
    job = lab.measure()
    job.result(timeout_s=20)
    assert calls[:2] == ["fc", "fc"]  # two probe batches
    assert len(calls) == 2 + 9 + 3 * 9  # then one pass for the noise of layers, and three for the score on all data


def test_noise_of_a_layer_is_that_of_its_value_on_the_first_probe_batch(lab: qlab.Lab, batches: list[Tensor]) -> None:
    lab.set("stem", "weight", bits=4)
    lab.measure().result(timeout_s=20)
    last = lab.noise["fc"]
    wanted, found = lab.sim.float_output(batches[0]).double(), lab.sim.output(batches[0]).double()
    assert last == pytest.approx(10 * math.log10(wanted.square().sum() / (wanted - found).square().sum()))
    frame = lab.layers().set_index("name")
    assert frame.loc["fc", "noise"] == last
    assert frame.loc["x", "noise"] > 40
    assert frame.loc["stem", "noise"] < 30


def test_a_live_lab_measures_after_every_change_without_being_asked(lab: qlab.Lab) -> None:
    lab.live = True
    lab.set("fc", "weight", bits=3)
    deadline = time.monotonic() + 10
    while lab.scores_are_stale and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lab.scores_are_stale
    assert lab.history["score"].notna().tolist() == [False, True]


def test_edits_supersede_a_measurement_and_the_last_one_is_measured(lab: qlab.Lab) -> None:
    lab.live = True
    for number in range(30):
        lab.set("fc", "weight", bits=2 + number % 7)
        time.sleep(0.002)
    lab.measure().result(timeout_s=20)
    assert not lab.scores_are_stale
    live = lab.known_scores
    again = qlab.SQNR(lab.batches.source[:2]).of_model(lab.sim)
    assert float(live["sqnr"].quantized) == pytest.approx(float(again))


def test_an_edit_does_not_wait_for_a_slow_measurement(sim: qlab.QuantSim, batches: list[Tensor]) -> None:
    slow = threading.Event()

    def score(model: nn.Module) -> float:
        for batch in batches * 50:
            model(batch)
            slow.set()
            time.sleep(0.005)
        return 1.0

    lab = qlab.Lab(sim, batches, score=score)
    job = lab.measure()
    slow.wait(20)
    asked = time.monotonic()
    lab.set("fc", "weight", bits=4)
    assert time.monotonic() - asked < 0.5
    assert job.state is JobState.RUNNING
    job.cancel()
    with pytest.raises(qlab.errors.Cancelled):
        job.result(timeout_s=5)
    assert lab.known_scores["score"].quantized is None


def test_a_technique_ends_a_live_measurement_and_the_scores_come_after_it(lab: qlab.Lab, nudge) -> None:
    lab.live = True
    lab.set("fc", "weight", bits=4)
    lab.start(nudge()).result(timeout_s=20)
    lab.measure().result(timeout_s=20)
    assert not lab.scores_are_stale
    assert lab.history["sqnr"].notna().iloc[-1]


def test_the_float_score_is_that_of_the_model_as_it_was_given(lab: qlab.Lab, nudge) -> None:
    exact = lab.sim.evaluate(lab.score, quantized=False)
    probe = lab.batches.source[:2]
    wanted = torch.cat([lab.sim.float_output(batch) for batch in probe]).double()
    lab.run(nudge(steps=30))
    found = torch.cat([lab.sim.output(batch) for batch in probe]).double()
    assert not torch.equal(wanted, torch.cat([lab.sim.float_output(batch) for batch in probe]).double())
    assert lab.scores["score"].float_value == exact
    ratio = wanted.square().sum() / (wanted - found).square().sum()
    assert lab.scores["sqnr"].quantized == pytest.approx(10 * math.log10(ratio))


def test_a_score_that_fails_is_raised_where_it_was_asked_for(sim: qlab.QuantSim, batches: list[Tensor]) -> None:
    def broken(model: nn.Module) -> float:
        raise ZeroDivisionError("in the score")

    lab = qlab.Lab(sim, batches, score=broken)
    with pytest.raises(ZeroDivisionError, match="in the score"):
        _ = lab.scores
    assert lab.known_scores["sqnr"].quantized is not None  # what was measured before it stands


def test_a_model_in_training_is_not_disturbed_by_a_live_lab(lab: qlab.Lab) -> None:
    lab.live = True
    lab.sim.train()
    lab.set("fc", "weight", bits=4)
    time.sleep(0.2)
    assert lab.scores_are_stale
    assert lab.sim.training


def test_scores_as_a_table_and_in_words(lab: qlab.Lab) -> None:
    frame = lab.scores.to_pandas()
    assert list(frame["name"]) == ["SQNR", "agreement", "accuracy"]
    assert list(frame["data"]) == ["2 probe batches", "2 probe batches", "all data"]
    assert frame["samples"].tolist() == [16, 16, 24]
    assert not frame["is_stale"].any()
    assert "accuracy (all data): float" in repr(lab.known_scores)
    assert lab.known_scores["accuracy"] == lab.known_scores["score"]
    with pytest.raises(KeyError, match="there is no score 'speed'"):
        lab.known_scores["speed"]


def test_without_a_score_there_are_two(sim: qlab.QuantSim, batches: list[Tensor]) -> None:
    lab = qlab.Lab(sim, batches, probe_batches=1)
    assert [row.key for row in lab.scores] == ["sqnr", "agreement"]
    assert lab.scores["sqnr"].data == "1 probe batch"
    assert not lab.scores_are_stale


def test_values_remembered_stay_within_the_budget_and_the_scores_are_the_same(
    sim: qlab.QuantSim, batches: list[Tensor], labelled: list
) -> None:
    lab = qlab.Lab(sim, batches, max_bytes=100_000)
    other = qlab.Lab(sim, batches)
    for bits in (4, 5):
        lab.set("body", "weight", bits=bits)
        assert lab.scores["sqnr"].quantized == other.scores["sqnr"].quantized
