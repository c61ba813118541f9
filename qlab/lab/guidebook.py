"""The guidebook: what to try, in which order, when a quantized model is not as good as the float one.

    is the pipeline sound? -> weights or activations? -> channels of weights -> rules of ranges -> which layer?
    -> what is wrong with it? -> what mends it? -> (the next layer) -> train -> the verdict

Each step examines a copy of the lab's sim as a job, shows its evidence, says what it concludes, offers remedies that
were tried, and the next step. Nothing is changed until a remedy is applied, which is a step of the lab's history.
"""

from dataclasses import dataclass
from typing import Any

from qlab.errors import HistoryError, InputError, nearest
from qlab.lab.guidebook_steps import GOOD_SQNR, STEPS, Bench, Finding, Goal, Reference, Step, done
from qlab.lab.jobs import Job
from qlab.lab.lab import Lab
from qlab.lab.showing import missing_note, module_of_views
from qlab.progress import Bar, Progress
from qlab.sim import Evaluation, QuantSim


class Guidebook:
    """The flow on one lab. `step()` runs the step that is offered, `apply()` does the remedy of the last finding.

    allowed_drop: of the lab's score against float, to be content with. sqnr: in dB, in its place without a score.
    findings: what was found so far, in order.
    """

    def __init__(self, lab: Lab, allowed_drop: float = 0.01, sqnr: float = GOOD_SQNR) -> None:
        if allowed_drop < 0:
            raise InputError(f"allowed_drop must be 0 or more; got {allowed_drop!r}.")
        self.lab = lab
        self.goal = Goal(allowed_drop, sqnr)
        self.findings: list[Finding] = []
        self._reference: Reference | None = None
        self._view: Any = None

    @property
    def offered(self) -> Step | None:
        """The step to go on with; None at the end."""
        key = self.findings[-1].next if self.findings else next(iter(STEPS))
        return None if key is None else STEPS[key]

    def start(self, key: str | None = None) -> Job:
        """Starts a step in the background, the one offered unless named; its Finding is the job's value.

        The offered one ends the flow where the goal is reached already; one that is named looks all the same.
        """
        step = self._step(key)
        return self.lab.start(_Examination(self, step, is_asked_for=key is not None))

    def step(self, key: str | None = None) -> Finding:
        """Runs a step to its end, with a bar; returns what it found."""
        found = _finished(self.start(key))
        assert isinstance(found, Finding)
        return found

    def apply(self, number: int = 0) -> None:
        """Does remedy `number` of the last finding through the lab, and waits; `lab.undo()` takes it back."""
        job = self.begin(number)
        if job is not None:
            _finished(job)

    def begin(self, number: int = 0) -> Job | None:
        """As `apply`, without waiting: the Job of a technique, None where it is done."""
        remedies = self.findings[-1].remedies if self.findings else ()
        if not 0 <= number < len(remedies):
            raise InputError(f"the last finding has {len(remedies)} remedies; there is none with number {number}.")
        done = remedies[number].perform(self.lab)
        return done if isinstance(done, Job) else None

    def bench(self, step: Step, sim: QuantSim, batches: Any, score: Evaluation | None, progress: Progress) -> Bench:
        """What a step works with; its numbers are held against the float model of the first step."""
        if self._reference is None:
            self._reference = Reference.of(sim, batches, score)
        return Bench(step, sim, batches, progress, self._reference, self.goal, tuple(self.findings))

    def __repr__(self) -> str:
        here = self.offered
        return f"Guidebook({len(self.findings)} steps taken, next: {here.title if here else 'none'})"

    def to_html(self) -> str:
        """Everything found so far."""
        from html import escape

        return f"<p>{escape(repr(self))}</p>" + "".join(found._repr_html_() for found in self.findings)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """The wizard in a notebook that has widgets, else what was found."""
        if self._view is None or self._view.comm is None:
            views = module_of_views()
            self._view = None if views is None else views.Guidebook(self.lab, self)
        if self._view is not None:
            return self._view._repr_mimebundle_(include=include, exclude=exclude)
        note = missing_note()
        plain = f"{self!r}\n{note}" if note else repr(self)
        return {"text/plain": plain, "text/html": self.to_html() + (f"<p>{note}</p>" if note else "")}

    def _step(self, key: str | None) -> Step:
        if key is not None:
            if key not in STEPS:
                raise InputError(f"there is no step {key!r} in the guidebook. {nearest(key, STEPS)}")
            return STEPS[key]
        if self.offered is None:
            raise HistoryError("the guidebook is at its end; name a step to look again: guide.step('sanity').")
        return self.offered


@dataclass(frozen=True)
class _Examination:
    """A step as an analysis, which a lab runs on a copy of its sim."""

    guide: Guidebook
    step: Step
    is_asked_for: bool

    @property
    def __name__(self) -> str:
        return f"guidebook: {self.step.title}"

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> Finding:
        """The finding, which the guidebook keeps."""
        bench = self.guide.bench(self.step, sim, batches, self.guide.lab.score, progress)
        is_done = bool(bench.past) and not self.is_asked_for and bench.is_good(bench.now)
        found = done(bench) if is_done else self.step.examine(bench)
        self.guide.findings.append(found)
        return found


def guidebook(lab: Lab, allowed_drop: float = 0.01, sqnr: float = GOOD_SQNR) -> Guidebook:
    """What to try, in which order: a flow that decides, from cells (`step`, `apply`) or as a wizard (last line)."""
    return Guidebook(lab, allowed_drop, sqnr)


def _finished(job: Job) -> Any:
    with Bar(job.title) as bar:
        return job.result(progress=bar)
