"""The steps of the guidebook: what each examines, and what it concludes from what it finds.

A step works on a `Bench`: a copy of the sim to try things on, which is as it was after every trial.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import pandas as pd

from qlab.analysis import layer_noise, units_of
from qlab.analysis.diagnosis import diagnose
from qlab.analysis.fixes import Fix
from qlab.errors import QlabError
from qlab.progress import Progress
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


Past: TypeAlias = "tuple[Finding, ...]"


@dataclass(frozen=True, eq=False)
class Reference:
    """The float model as it was at the first step, which training moves: SQNR against it, the score and its score."""

    noise: SQNR
    score: Evaluation | None
    float_score: float

    @classmethod
    def of(cls, sim: QuantSim, batches: Any, score: Evaluation | None) -> "Reference":
        """That of the sim's float model now."""
        noise = SQNR(list(islice(batches, BATCHES)))
        noise.prepare(sim)
        return cls(noise, score, math.nan if score is None else float(sim.evaluate(score, quantized=False)))


class Bench:
    """What a step works with: a copy of the sim to try things on, data, the goal, and what was found before."""

    def __init__(
        self,
        step: Step,
        sim: QuantSim,
        batches: Any,
        progress: Progress,
        reference: "Reference",
        goal: Goal,
        past: Past,
    ) -> None:
        self.step, self.sim, self.progress, self.past = step, sim, progress, past
        self.batches = list(islice(batches, BATCHES))
        self.all_batches = batches
        self._goal, self._reference = goal, reference
        self.now = self.row("as set")

    def row(self, name: str) -> dict[str, Any]:
        """One row of evidence: SQNR and score of the sim as it is now."""
        self.progress.step(0, 0, name)
        row = {"tried": name, "sqnr": float(self.sim.evaluate(self._reference.noise))}
        score = self._reference.score
        return row if score is None else {**row, "score": float(self.sim.evaluate(score))}

    def float_row(self) -> dict[str, Any]:
        """The same of the float model."""
        row = {"tried": "float", "sqnr": math.inf}
        return row if self._reference.score is None else {**row, "score": self._reference.float_score}

    def is_good(self, row: dict[str, Any]) -> bool:
        """Whether the goal is reached."""
        if self._reference.score is None:
            return row["sqnr"] >= self._goal.sqnr
        return row["score"] >= self._reference.float_score - self._goal.allowed_drop

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


def described(fix: Fix) -> str:
    """A remedy in one line, with what it gained when tried."""
    return fix.label + ("" if math.isnan(fix.predicted_gain) else f" ({fix.predicted_gain:+.1f} dB)")


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
        return done(bench)
    said = (
        f"The goal is not reached: {bench.told(bench.now)}. More bits where they pay: qlab.MixedPrecision, or "
        "16-bit activations (presets.w8a16)."
    )
    return bench.finding([bench.float_row(), bench.now], said, None)


def done(bench: Bench) -> Finding:
    """The finding that ends the flow: the goal is reached."""
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
