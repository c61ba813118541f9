"""Events: who listens hears of every change once, and a listener that fails disturbs nobody."""

import threading

import pytest

import qlab
from qlab.lab import LabEvents


@pytest.fixture
def heard(lab: qlab.Lab) -> list[tuple]:
    heard: list[tuple] = []
    for name in ("edited", "selected", "history_changed", "job_started", "job_ended", "error", "noise"):
        getattr(lab.events, name).connect(lambda *values, name=name: heard.append((name, *values)))
    lab.events.scores.connect(lambda scores: heard.append(("scores", scores.are_stale)))
    return heard


def test_an_edit_is_told_once_with_every_layer_that_shows_the_quantizer(lab: qlab.Lab, heard: list) -> None:
    lab.set("relu", "output", bits=4)
    assert heard == [("edited", ("stem", "norm", "relu")), ("history_changed",), ("scores", True)]


def test_an_edit_that_is_refused_is_not_told(lab: qlab.Lab, heard: list) -> None:
    with pytest.raises(qlab.errors.SpecError):
        lab.set("fc", "weight", bits=1)
    assert heard == []


def test_undo_and_redo_are_told_like_edits(lab: qlab.Lab, heard: list) -> None:
    lab.set("fc", "weight", bits=4)
    heard.clear()
    lab.undo()
    lab.redo()
    assert [event for event in heard if event[0] == "edited"] == [("edited", ("fc",))] * 2


def test_a_change_in_a_cell_is_told_when_it_is_noticed(lab: qlab.Lab, heard: list) -> None:
    lab.sim["fc"].weight.bits = 4
    assert heard == []
    lab.refresh()
    lab.refresh()
    assert heard == [("edited", ("fc",)), ("history_changed",), ("scores", True)]


def test_the_selection_is_told_when_it_changes(lab: qlab.Lab, heard: list) -> None:
    lab.select("fc")
    lab.select("fc")
    lab.select("relu*")
    lab.select([])
    assert heard == [("selected", ("fc",)), ("selected", ("relu", "relu_1")), ("selected", ())]


def test_a_technique_is_told_from_beginning_to_end(lab: qlab.Lab, heard: list, nudge) -> None:
    job = lab.start(nudge())
    job.result(timeout_s=20)
    assert [event[0] for event in heard] == ["job_started", "job_ended", "edited", "history_changed", "scores"]
    assert heard[0][1] is heard[1][1] is job
    assert heard[2][1] == tuple(lab.layers()["name"])


def test_measuring_is_told_step_by_step(lab: qlab.Lab, heard: list) -> None:
    lab.measure().result(timeout_s=20)
    assert [event[0] for event in heard if event[0] != "history_changed"] == [
        "job_started",
        "scores",  # the probe batches
        "noise",
        "scores",  # the score on all data
        "job_ended",
    ]
    assert [event[1] for event in heard if event[0] == "scores"] == [True, False]


def test_events_come_when_the_lab_is_consistent_and_its_lock_is_free(lab: qlab.Lab) -> None:
    seen: list[object] = []

    def look(names: tuple[str, ...]) -> None:
        other = threading.Thread(target=lambda: seen.append(lab.layer_row("fc").weight_bits))
        other.start()
        other.join(5)
        seen.append(lab.step)

    lab.events.edited.connect(look)
    lab.set("fc", "weight", bits=4)
    assert seen == [4, 1]


def test_a_callback_that_fails_is_announced_and_the_others_are_called(lab: qlab.Lab, monkeypatch) -> None:
    monkeypatch.delenv("QLAB_STRICT", raising=False)
    heard: list[object] = []

    @lab.events.edited.connect
    def fail(names: tuple[str, ...]) -> None:
        raise ZeroDivisionError("in a view")

    lab.events.edited.connect(heard.append)
    lab.events.error.connect(heard.append)
    lab.set("fc", "weight", bits=4)
    assert lab.step == 1
    assert isinstance(heard[0], ZeroDivisionError)
    assert heard[1] == ("fc",)


def test_a_callback_that_fails_is_raised_when_strict_and_the_edit_stands(lab: qlab.Lab, monkeypatch) -> None:
    monkeypatch.setenv("QLAB_STRICT", "1")

    @lab.events.edited.connect
    def fail(names: tuple[str, ...]) -> None:
        raise ZeroDivisionError("in a view")

    with pytest.raises(ZeroDivisionError, match="in a view"):
        lab.set("fc", "weight", bits=4)
    assert lab.step == 1


def test_an_error_of_the_error_callback_does_not_go_round_in_circles(lab: qlab.Lab, monkeypatch) -> None:
    monkeypatch.delenv("QLAB_STRICT", raising=False)
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise ZeroDivisionError

    lab.events.edited.connect(fail)
    lab.events.error.connect(fail)
    lab.set("fc", "weight", bits=4)
    assert len(calls) == 2


def test_connecting_twice_calls_once_and_disconnecting_ends_it() -> None:
    events, calls = LabEvents(), []
    events.edited.connect(calls.append)
    events.edited.connect(calls.append)
    events.send("edited", ("a",))
    events.edited.disconnect(calls.append)
    events.edited.disconnect(calls.append)
    events.send("edited", ("b",))
    assert calls == [("a",)]
    assert len(events.edited) == 0


def test_records_published_by_work_reach_the_listeners(lab: qlab.Lab) -> None:
    records: list[object] = []
    lab.events.job_published.connect(lambda job, record: records.append((job.title, record)))

    def train(sim: qlab.QuantSim, progress: qlab.Progress) -> None:
        qlab.progress.publish(progress, {"loss": 0.5})

    lab.run(train)
    assert records == [("train", {"loss": 0.5})]
