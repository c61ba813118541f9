"""Jobs: what a person can do to long work, and that nothing of it is left behind."""

import _thread
import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import torch

import qlab
from qlab.errors import Busy, Cancelled
from qlab.lab import Job, JobState
from qlab.lab.events import LabEvents
from qlab.lab.jobs import Worker
from tests.lab.conftest import differing, state_of


@pytest.fixture
def events() -> LabEvents:
    return LabEvents()


@pytest.fixture
def worker() -> Worker:
    return Worker()


def endless(began: threading.Event) -> Callable[[Job], None]:
    def work(job: Job) -> None:
        for step in range(10**9):
            job.step(step, 10**9, "spin")
            began.set()
            time.sleep(0.001)

    return work


def test_a_job_runs_in_another_thread_and_gives_its_value(worker: Worker, events: LabEvents) -> None:
    job = worker.start(Job(lambda job: threading.current_thread().name, "where", False, events))
    assert job.result(timeout_s=5) == "qlab-job"
    assert job.state is JobState.DONE


def test_cancel_stops_at_the_next_step(worker: Worker, events: LabEvents) -> None:
    began = threading.Event()
    job = worker.start(Job(endless(began), "spin", True, events))
    began.wait(5)
    asked = time.monotonic()
    job.cancel()
    with pytest.raises(Cancelled, match="spin was cancelled at step"):
        job.result(timeout_s=5)
    assert time.monotonic() - asked < 0.5
    assert job.state is JobState.CANCELLED


def test_a_cancel_after_the_end_does_nothing(worker: Worker, events: LabEvents) -> None:
    job = worker.start(Job(lambda job: 7, "quick", False, events))
    assert job.result(timeout_s=5) == 7
    job.cancel()
    assert job.state is JobState.DONE
    assert job.result() == 7


def test_a_failure_is_kept_with_its_traceback_and_raised_by_result(worker: Worker, events: LabEvents) -> None:
    def fail(job: Job) -> None:
        raise ZeroDivisionError("on purpose")

    job = worker.start(Job(fail, "fail", False, events))
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        job.result(timeout_s=5)
    assert job.state is JobState.FAILED
    assert job.exception is not None
    assert job.exception.__traceback__ is not None


def test_jobs_run_one_after_the_other_in_the_order_given(worker: Worker, events: LabEvents) -> None:
    running, order, most = [0], [], [0]

    def work(name: str) -> Callable[[Job], None]:
        def run(job: Job) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            order.append(name)
            time.sleep(0.01)
            running[0] -= 1

        return run

    jobs = [worker.start(Job(work(name), name, False, events)) for name in "abcde"]
    for job in jobs:
        job.result(timeout_s=5)
    assert order == list("abcde")
    assert most[0] == 1


def test_progress_is_reported_at_most_ten_times_a_second(worker: Worker, events: LabEvents) -> None:
    reports: list[int] = []
    events.job_progress.connect(lambda job: reports.append(job.done))

    def work(job: Job) -> None:
        end = time.monotonic() + 0.5
        step = 0
        while time.monotonic() < end:
            job.step(step, 10**6)
            step += 1

    job = worker.start(Job(work, "count", False, events))
    job.result(timeout_s=5)
    assert job.done > 100
    assert 2 <= len(reports) <= 6


def test_paused_work_stands_still_and_goes_on(worker: Worker, events: LabEvents) -> None:
    began = threading.Event()
    job = worker.start(Job(endless(began), "spin", True, events))
    began.wait(5)
    job.pause()
    time.sleep(0.05)
    held = job.done
    time.sleep(0.05)
    assert job.done == held
    job.resume()
    time.sleep(0.1)
    assert job.done > held
    job.pause()
    job.cancel()  # a paused job can be cancelled as well
    with pytest.raises(Cancelled):
        job.result(timeout_s=5)


def test_a_job_says_its_rate_and_the_time_left(worker: Worker, events: LabEvents) -> None:
    job = worker.start(Job(lambda job: (time.sleep(0.2), job.step(2, 4)), "half", False, events))
    assert job.rate is None or job.rate > 0
    job.result(timeout_s=5)
    assert job.rate == pytest.approx(2 / job.seconds)
    assert job.seconds_left == 0.0


def test_awaiting_a_job_keeps_the_event_loop_alive(worker: Worker, events: LabEvents) -> None:
    ticks = 0

    async def cell() -> int:
        nonlocal ticks
        job = worker.start(Job(lambda job: (time.sleep(0.3), 5)[1], "wait", False, events))

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.ensure_future(tick())
        value = await job
        ticking.cancel()
        return value

    assert asyncio.run(cell()) == 5
    assert ticks > 5


def test_result_inside_the_job_itself_is_refused_instead_of_hanging(worker: Worker, events: LabEvents) -> None:
    jobs: list[Job] = []
    job = Job(lambda _: jobs[0].result(), "self", False, events)
    jobs.append(job)
    worker.start(job)
    with pytest.raises(Busy, match="waits for itself"):
        job.result(timeout_s=5)


def test_waiting_for_a_job_does_not_end_it(worker: Worker, events: LabEvents) -> None:
    began = threading.Event()
    job = worker.start(Job(endless(began), "spin", False, events))
    began.wait(5)
    with pytest.raises(TimeoutError, match="still running"):
        job.result(timeout_s=0.1)
    assert job.state is JobState.RUNNING
    job.cancel()


def test_the_worker_thread_ends_with_the_work(worker: Worker, events: LabEvents) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        worker.start(Job(lambda job: None, "nothing", False, events)).result(timeout_s=5)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_a_cancelled_technique_leaves_the_lab_as_it_was(lab: qlab.Lab, nudge, batches) -> None:
    before, history = state_of(lab.sim), lab.history
    output = lab.sim.output(batches[0])
    job: list[Job] = []
    job.append(lab.start(nudge(steps=50, at_step=lambda step: job[0].cancel() if step == 3 and job else None)))
    with pytest.raises(Cancelled):
        job[0].result(timeout_s=20)
    assert differing(before, state_of(lab.sim)) == []
    assert lab.history.equals(history)
    assert torch.equal(lab.sim.output(batches[0]), output)


def test_an_interrupt_cancels_the_technique_waits_until_it_is_restored_and_is_raised(lab: qlab.Lab, nudge) -> None:
    before = state_of(lab.sim)

    def interrupt(step: int) -> None:
        if step == 2:
            _thread.interrupt_main()
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        lab.run(nudge(steps=500, at_step=interrupt))
    assert differing(before, state_of(lab.sim)) == []
    assert lab.jobs == []
    assert lab.step == 0


def test_a_technique_that_fails_leaves_the_lab_as_it_was(lab: qlab.Lab, nudge) -> None:
    before = state_of(lab.sim)

    def fail(step: int) -> None:
        if step == 1:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        lab.run(nudge(at_step=fail))
    assert differing(before, state_of(lab.sim)) == []
    assert not lab.is_busy


def test_edits_are_refused_with_a_sentence_while_a_technique_runs(lab: qlab.Lab, nudge) -> None:
    began = threading.Event()
    job = lab.start(nudge(steps=10**6, at_step=lambda step: (began.set(), time.sleep(0.001))))
    began.wait(5)
    for edit in (
        lambda: lab.set("fc", "weight", bits=4),
        lambda: lab.set_range("fc", "output", -1, 1),
        lab.undo,
        lambda: lab.go_to(0),
    ):
        with pytest.raises(Busy, match="_Nudge is changing the sim"):
            edit()
    assert lab.is_busy
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout_s=5)
    lab.set("fc", "weight", bits=4)
    assert lab.sim["fc"].weight.bits == 4


def test_views_can_read_while_a_technique_runs(lab: qlab.Lab, nudge) -> None:
    began = threading.Event()
    job = lab.start(nudge(steps=10**6, at_step=lambda step: (began.set(), time.sleep(0.001))))
    began.wait(5)
    before = job.done
    assert len(lab.layers()) == 9
    assert lab.layer_row("fc").weight_bits == 8
    assert lab.histogram("fc").counts.sum() == 24
    assert lab.known_scores["sqnr"].quantized is None
    assert job.done - before < 60  # each look waits for the next step or two, not for the end
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout_s=5)


def test_the_same_works_from_a_thread_that_is_not_the_main_one(lab: qlab.Lab, nudge) -> None:
    outcome: list[object] = []

    def elsewhere() -> None:
        lab.set("fc", "weight", bits=4)
        outcome.append(lab.run(nudge()))
        lab.undo()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(20)
    assert outcome[0].technique == "_Nudge"
    assert lab.step == 1


def test_two_techniques_started_at_once_run_one_after_the_other(lab: qlab.Lab, nudge) -> None:
    first, second = lab.start(nudge(steps=2)), lab.start(nudge(steps=4))
    second.result(timeout_s=20)
    assert first.state is JobState.DONE
    assert list(lab.history["action"]) == ["start", "_Nudge(steps=2)", "_Nudge(steps=4)"]


def test_lab_run_inside_a_job_is_refused_instead_of_hanging(lab: qlab.Lab, nudge) -> None:
    with pytest.raises(Busy, match="from inside a job"):
        lab.run(nudge(at_step=lambda step: lab.run(nudge())))


def test_a_function_is_a_transaction_as_well(lab: qlab.Lab) -> None:
    def zero(sim: qlab.QuantSim, progress: qlab.Progress) -> str:
        progress.step(0, 1)
        with torch.no_grad():
            sim.model.fc.weight.zero_()
        return "done"

    def fail(sim: qlab.QuantSim, progress: qlab.Progress) -> None:
        zero(sim, progress)
        raise ValueError("no")

    before = state_of(lab.sim)
    with pytest.raises(ValueError, match="no"):
        lab.run(fail)
    assert differing(before, state_of(lab.sim)) == []
    assert lab.run(zero) == "done"
    assert not lab.sim.model.fc.weight.any()
    lab.undo()
    assert differing(before, state_of(lab.sim)) == []


def test_an_analysis_gets_a_copy_so_that_edits_go_on(lab: qlab.Lab) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Analysis:
        def measure(self, sim, batches, score=None, progress=None) -> int:
            began.set()
            go_on.wait(5)
            progress.step(1, 1)
            return sim["fc"].weight.bits

    job = lab.start(Analysis())
    began.wait(5)
    lab.set("fc", "weight", bits=4)
    go_on.set()
    assert job.result(timeout_s=5) == 8
    assert lab.sim["fc"].weight.bits == 4


def test_the_rows_of_an_analysis_are_published_as_they_are_found(lab: qlab.Lab) -> None:
    rows: list[object] = []
    lab.events.job_published.connect(lambda job, row: rows.append(row))
    lab.set("fc", "weight", bits=4)
    analysis = lab.run(qlab.QuantAnalyzer())
    assert len(rows) >= len(analysis.ranking())
    assert lab.step == 1


def test_paused_techniques_keep_the_sim_and_let_views_read(lab: qlab.Lab, nudge) -> None:
    began = threading.Event()
    job = lab.start(nudge(steps=300, at_step=lambda step: (began.set(), time.sleep(0.002))))
    began.wait(5)
    job.pause()
    time.sleep(0.1)
    assert lab.layer_row("fc").weight_bits == 8
    with pytest.raises(Busy):
        lab.set("fc", "weight", bits=4)
    job.resume()
    assert job.result(timeout_s=20).technique == "_Nudge"


def test_work_may_report_from_threads_of_its_own(lab: qlab.Lab) -> None:
    def spread(sim: qlab.QuantSim, progress: qlab.Progress) -> str:
        helpers = [threading.Thread(target=progress.step, args=(step, 4)) for step in range(4)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()
        progress.step(4, 4)
        return "spread"

    assert lab.run(spread) == "spread"


def test_a_job_that_waits_is_cancelled_at_once(worker: Worker, events: LabEvents) -> None:
    began, ended = threading.Event(), []
    events.job_ended.connect(ended.append)
    running = worker.start(Job(endless(began), "spin", False, events))
    began.wait(5)
    waiting = worker.start(Job(lambda job: 1, "next", False, events))
    after = worker.start(Job(lambda job: 2, "last", False, events))
    waiting.cancel()
    assert waiting.state is JobState.CANCELLED
    assert ended == [waiting]
    with pytest.raises(Cancelled, match="next was cancelled before it began"):
        waiting.result()
    running.cancel()
    assert after.result(timeout_s=5) == 2
    assert ended == [waiting, running, after]
