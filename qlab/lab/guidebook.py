"""The guidebook: what to try, in which order, when a quantized model is not as good as the float one.

    is the pipeline sound? -> weights or activations? -> channels of weights -> rules of ranges -> which layer?
    -> what is wrong with it? -> what mends it? -> (the next layer) -> train -> the verdict

Each step examines a copy of the lab's sim as a job, shows its evidence, says what it concludes, offers remedies that
were tried, and the next step. Nothing is changed until a remedy is applied, which is a step of the lab's history.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pandas as pd

from qlab.analysis import layer_noise, units_of
from qlab.analysis.diagnosis import diagnose
from qlab.analysis.fixes import Fix
from qlab.errors import HistoryError, InputError, QlabError, nearest
from qlab.lab.jobs import Job
from qlab.lab.lab import Lab
from qlab.lab.showing import missing_note, module_of_views
from qlab.progress import Bar, Progress
from qlab.quantization import WeightQuantizer
from qlab.sim import SQNR, Evaluation, QuantSim, Snapshot

BATCHES = 4  # of the lab's, for SQNR: enough to rank remedies by
GOOD_SQNR = 20.0  # dB; noise of a tenth of the signal's amplitude
SOUND_SQNR = 40.0  # dB; less at 16 bits is no matter of bits
GAIN = 0.5  # dB; what a remedy must bring to be offered
ROUNDS = 3  # layers to mend one by one before training
CANDIDATES = 5
TRAINING_STEPS = 100
RULES = ("min_max", "percentile", "mse", "sqnr", "entropy")


@dataclass(frozen=True)
class Goal:
    """When a person is content. allowed_drop: of the score against float. sqnr: in dB, where the lab has no score."""

    allowed_drop: float = 0.01
    sqnr: float = GOOD_SQNR


@dataclass(frozen=True, eq=False)
class Finding:
    """What one step found.

    evidence: a table, its first column what was looked at, `sqnr` in dB and `score` where they were measured.
    remedies: what was tried and helps, the best first. next: the key of the step to go on with, None at the end.
    layer: the layer that it is about.
    """

    step: "Step"
    evidence: pd.DataFrame
    conclusion: str
    next: str | None
    remedies: tuple[Fix, ...] = ()
    layer: str | None = None

    @property
    def key(self) -> str:
        """The key of its step."""
        return self.step.key

    def __repr__(self) -> str:
        lines = [self.step.title, self.evidence.to_string(index=False, float_format=_number, na_rep="")]
        lines += [f"=> {self.conclusion}"]
        lines += [f"   remedy {number}: {described(fix)}" for number, fix in enumerate(self.remedies)]
        return "\n".join([*lines, f"   next: {STEPS[self.next].title}" if self.next else "   the end"])

    def _repr_html_(self) -> str:
        from html import escape

        table = self.evidence.to_html(index=False, float_format=_number, na_rep="", border=0)  # pandas escapes cells
        remedies = "".join(f"<li>{escape(described(fix))}</li>" for fix in self.remedies)
        onward = f"Next: {STEPS[self.next].title}" if self.next else "The end."
        return (
            f"<p><b>{escape(self.step.title)}</b></p>{table}<p>{escape(self.conclusion)}</p>"
            f"<ul>{remedies}</ul><p><em>{escape(onward)}</em></p>"
        )


@dataclass(frozen=True)
class Step:
    """One step: what it asks, why, and the function that examines a sim."""

    key: str
    title: str
    why: str
    examine: Callable[["Bench"], Finding] = field(repr=False)


class Bench:
    """What a step works with: a copy of the sim to try things on, data, the goal, and what was found before."""

    def __init__(
        self, step: Step, guide: "Guidebook", sim: QuantSim, batches: Any, score: Evaluation | None, progress: Progress
    ) -> None:
        self.step, self.sim, self.progress = step, sim, progress
        self.batches = list(islice(batches, BATCHES))
        self.all_batches = batches
        self.past = tuple(guide.findings)
        self._goal, self._score = guide.goal, score
        self._noise, self._float_score = guide.reference(sim, self.batches, score)
        self.now = self.row("as set")

    def row(self, name: str) -> dict[str, Any]:
        """One row of evidence: SQNR and score of the sim as it is now."""
        self.progress.step(0, 0, name)
        row = {"tried": name, "sqnr": float(self.sim.evaluate(self._noise))}
        return row if self._score is None else {**row, "score": float(self.sim.evaluate(self._score))}

    def float_row(self) -> dict[str, Any]:
        """The same of the float model."""
        row = {"tried": "float", "sqnr": math.inf}
        return row if self._score is None else {**row, "score": self._float_score}

    def is_good(self, row: dict[str, Any]) -> bool:
        """Whether the goal is reached."""
        if self._score is None:
            return row["sqnr"] >= self._goal.sqnr
        return row["score"] >= self._float_score - self._goal.allowed_drop

    @contextmanager
    def trial(self, part: str = "") -> Iterator[QuantSim]:
        """Within the context the sim may be changed. part: 'weights' or 'activations' to quantize these alone."""
        snapshot = Snapshot(self.sim)
        try:
            if part:
                self._quantize_only(part)
            yield self.sim
        finally:
            snapshot.restore()

    def tried(self, fixes: Sequence[Fix], part: str = "") -> tuple[list[dict[str, Any]], tuple[Fix, ...]]:
        """Rows of the sim as set and with each fix, and the fixes that gain enough, the best first.

        part: what the fixes are for, quantized alone, so that the noise of the rest does not hide what they do.
        """
        alone = f", {part} alone" if part else ""
        with self.trial(part):
            before = self.row(f"as set{alone}") if part else self.now
        rows, good = [before], []
        for fix in fixes:
            with self.trial() as sim:
                try:
                    if fix.verb == "run":
                        fix.technique().apply(sim, self.all_batches, progress=self.progress)
                    else:
                        sim.configure(**fix.arguments)
                except QlabError as error:
                    rows.append({"tried": f"{fix.label}: {error}"})
                    continue
                if part:
                    self._quantize_only(part)
                row = self.row(f"{fix.label}{alone}")
            rows.append(row)
            gain = row["sqnr"] - before["sqnr"]
            if gain > GAIN:
                arguments = (fix.label, fix.verb, fix.arguments)
                good.append(Fix(*arguments, predicted_gain=gain))
        return rows, tuple(sorted(good, key=lambda fix: -fix.predicted_gain))

    def finding(self, rows: Any, conclusion: str, next_step: str | None, **more: Any) -> Finding:
        """The finding of this step."""
        return Finding(self.step, pd.DataFrame(rows), conclusion, next_step, **more)

    def was_at(self, key: str) -> int:
        """How many findings of that step there are."""
        return sum(finding.key == key for finding in self.past)

    def told(self, row: dict[str, Any]) -> str:
        """A row in words."""
        return f"{row['sqnr']:.1f} dB" + (f", score {row['score']:.4g}" if "score" in row else "")

    def _quantize_only(self, part: str) -> None:
        for quantizer in self.sim.quantizers.values():
            if isinstance(quantizer, WeightQuantizer) != (part == "weights"):
                quantizer.enabled = False


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
        self._reference: tuple[SQNR, float] | None = None
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

    def reference(self, sim: QuantSim, batches: list[Any], score: Evaluation | None) -> tuple[SQNR, float]:
        """SQNR against the float model as it was at the first step, and its score then: training moves both."""
        if self._reference is None:
            noise = SQNR(batches)
            noise.prepare(sim)
            self._reference = noise, math.nan if score is None else float(sim.evaluate(score, quantized=False))
        return self._reference

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
        bench = Bench(self.step, self.guide, sim, batches, self.guide.lab.score, progress)
        is_done = bool(bench.past) and not self.is_asked_for and bench.is_good(bench.now)
        found = _done(bench) if is_done else self.step.examine(bench)
        self.guide.findings.append(found)
        return found


def guidebook(lab: Lab, allowed_drop: float = 0.01, sqnr: float = GOOD_SQNR) -> Guidebook:
    """What to try, in which order: a flow that decides, from cells (`step`, `apply`) or as a wizard (last line)."""
    return Guidebook(lab, allowed_drop, sqnr)


def _finished(job: Job) -> Any:
    with Bar(job.title) as bar:
        return job.result(progress=bar)


def described(fix: Fix) -> str:
    """A remedy in one line, with what it gained when tried."""
    return fix.label + ("" if math.isnan(fix.predicted_gain) else f" ({fix.predicted_gain:+.1f} dB)")


# The steps ------------------------------------------------------------------------------------------------------------


def _sanity(bench: Bench) -> Finding:
    with bench.trial() as sim:
        sim.configure("*", weight={"bits": 16}, output={"bits": 16})
        fine = bench.row("16 bits everywhere")
    rows = [bench.float_row(), fine, bench.now]
    if bench.is_good(bench.now):
        return bench.finding(rows, f"As set it is good enough: {bench.told(bench.now)}.", None)
    if fine["sqnr"] < SOUND_SQNR and not bench.is_good(fine):
        said = "Even 16 bits do not hold what the float model computes: not bits are missing, ranges do not fit."
        return bench.finding(rows, said, "parts")
    said = f"The pipeline is sound, 16 bits reach {bench.told(fine)}; the bits as set do not: {bench.told(bench.now)}."
    return bench.finding(rows, said, "parts")


def _parts(bench: Bench) -> Finding:
    rows = {}
    for part in ("weights", "activations"):
        with bench.trial(part):
            rows[part] = bench.row(f"{part} alone")
    worse, other = sorted(rows, key=lambda part: rows[part]["sqnr"])
    said = (
        f"The {worse} cost more: {bench.told(rows[worse])} with them alone, {bench.told(rows[other])} with the other."
    )
    if bench.is_good(rows["weights"]):
        return bench.finding([*rows.values(), bench.now], f"{said} The weights alone are good enough.", "ranges")
    aside = "" if worse == "weights" else " The weights come first all the same: what mends them moves the activations."
    return bench.finding([*rows.values(), bench.now], said + aside, "channels")


def _channels(bench: Bench) -> Finding:
    fixes = [
        Fix("equalize channels across layers (CLE)", "run", {"technique": "CrossLayerEqualization", "settings": {}}),
        Fix("give each channel a scale", "configure", {"pattern": "*", "weight": {"granularity": "per_channel"}}),
    ]
    rows, good = bench.tried(fixes, "weights")
    said = f"To {good[0].label} helps most." if good else "The channels of the weights are not what costs."
    return bench.finding(rows, said, "ranges", remedies=good)


def _ranges(bench: Bench) -> Finding:
    used = {str(q.rule) for q in bench.sim.quantizers.values() if not isinstance(q, WeightQuantizer)}
    rules = [rule for rule in RULES if used != {rule}]
    fixes = [Fix(f"{rule} ranges", "configure", {"pattern": "*", "output": {"rule": rule}}) for rule in rules]
    rows, good = bench.tried(fixes, "activations")
    said = f"{good[0].label} serve best." if good else "No other rule for the activations' ranges is better."
    return bench.finding(rows, said, "layers", remedies=good)


def _layers(bench: Bench) -> Finding:
    """The layers that add most noise, and what would be gained without the noise of each."""
    known = {finding.layer for finding in bench.past if finding.key == "mend"}
    noise = layer_noise(bench.sim, bench.batches[:1], bench.progress).nsmallest(CANDIDATES + len(known), "own_sqnr")
    units = {name: unit for unit in units_of(bench.sim) for name in unit.layers}
    rows: dict[str, dict[str, Any]] = {}
    for name, own in zip(noise.layer, noise.own_sqnr, strict=True):
        unit = units.get(name)
        if unit is None or unit.layer in rows or unit.layer in known or len(rows) == CANDIDATES:
            continue
        with bench.trial() as sim:
            for key in unit.quantizers:
                sim.quantizers[key].enabled = False
            row = bench.row(f"without the noise of {unit.layer}")
        rows[unit.layer] = {"layer": unit.layer, "own sqnr": own, **{k: v for k, v in row.items() if k != "tried"}}
    if not rows:
        return bench.finding([bench.now], "No layer is left to look at.", "train")
    worst = max(rows, key=lambda name: rows[name]["sqnr"])
    gain = rows[worst]["sqnr"] - bench.now["sqnr"]
    said = f"{worst} costs most: without its noise the result gains {gain:.1f} dB."
    ordered = sorted(rows.values(), key=lambda row: -row["sqnr"])
    return bench.finding(ordered, said, "look", layer=worst)


def _look(bench: Bench) -> Finding:
    layer = _focus(bench)
    found = diagnose(bench.sim, layer, bench.batches, bench.progress, tries=False)
    parts = found.parts.rename(columns={"part": "part of the error"})
    return bench.finding(parts, f"{layer}: {found.cause}", "mend", layer=layer)


def _mend(bench: Bench) -> Finding:
    layer = _focus(bench)
    found = diagnose(bench.sim, layer, bench.batches, bench.progress)
    fixes = tuple(sorted((fix for fix in found.fixes if fix.predicted_gain > GAIN), key=_worth, reverse=True))
    rows = [bench.now, *({"tried": fix.label, "sqnr": bench.now["sqnr"] + fix.predicted_gain} for fix in fixes)]
    said = f"{fixes[0].label} helps most." if fixes else f"Nothing at {layer} alone helps enough."
    onward = "layers" if bench.was_at("mend") + 1 < ROUNDS else "train"
    return bench.finding(rows, said, onward, remedies=fixes, layer=layer)


def _train(bench: Bench) -> Finding:
    """Rounding first, where weights are narrow and it was not done; then fine-tuning, which is offered untried."""
    epochs = max(1, min(TRAINING_STEPS // max(len(bench.all_batches), 1), 20))
    tuning = Fix(f"fine-tune for {epochs} epochs (QAT)", "run", {"technique": "QAT", "settings": {"epochs": epochs}})
    narrow = any(isinstance(q, WeightQuantizer) and q.enabled and q.bits < 8 for q in bench.sim.quantizers.values())
    if narrow and not bench.was_at("train"):
        rounding = Fix("round weights well (AdaRound)", "run", {"technique": "AdaRound", "settings": {}})
        rows, good = bench.tried([rounding])
        if good:
            said = "Rounding the weights well helps, without training. Fine-tuning comes after it."
            return bench.finding(rows, said, "train", remedies=(*good, tuning))
    said = "What helps without training is done. To fine-tune through the simulation is what remains, beside more bits."
    return bench.finding([bench.now], said, "verdict", remedies=(tuning,))


def _verdict(bench: Bench) -> Finding:
    if bench.is_good(bench.now):
        return _done(bench)
    said = (
        f"The goal is not reached: {bench.told(bench.now)}. More bits where they pay: qlab.MixedPrecision, or "
        "16-bit activations (presets.w8a16)."
    )
    return bench.finding([bench.float_row(), bench.now], said, None)


def _done(bench: Bench) -> Finding:
    said = f"The goal is reached: {bench.told(bench.now)}."
    rows = [bench.float_row(), bench.now]
    return Finding(STEPS["verdict"], pd.DataFrame(rows), said, None)


def _worth(fix: Fix) -> float:
    """The gain, less what the target pays for: wide grids and layers in float."""
    price = 1.0 if fix.arguments.get("enabled") is False else 0.5 if fix.arguments.get("bits", 0) > 8 else 0.0
    return fix.predicted_gain - price


def _focus(bench: Bench) -> str:
    """The layer that the last finding was about; else the one that adds most noise."""
    if bench.past and bench.past[-1].layer is not None:
        return bench.past[-1].layer
    return str(layer_noise(bench.sim, bench.batches[:1], bench.progress).nsmallest(1, "own_sqnr").layer.iloc[0])


def _number(value: float) -> str:
    return f"{value:.4g}"


STEPS: dict[str, Step] = {
    step.key: step
    for step in (
        Step("sanity", "Is the pipeline sound?", "The float model, and the same at 16 bits, must be good.", _sanity),
        Step("parts", "Weights or activations?", "Each is quantized alone: the worse one is looked at first.", _parts),
        Step("channels", "Do channels of weights differ?", "One grid must hold the widest channel.", _channels),
        Step("ranges", "Which rule for the ranges?", "A wide range rounds coarsely, a narrow one clips.", _ranges),
        Step("layers", "Which layer costs most?", "Usually a few layers carry most of the loss.", _layers),
        Step("look", "What is wrong with it?", "Its error taken apart: inherited, rounded, clipped.", _look),
        Step("mend", "What would mend it?", "Changes at this layer alone, each one tried.", _mend),
        Step("train", "Is it worth training?", "When nothing cheaper is left.", _train),
        Step("verdict", "Is it good enough?", "The result against the goal.", _verdict),
    )
}
"""The steps by key, in the order in which they are met; add one of your own to take part in the flow."""
