"""The search of mixed precision: losses from one pass, the front by a Lagrangian sweep, the choice by true scores."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qlab.analysis.estimate import estimate_sensitivity
from qlab.analysis.shadow import shadow
from qlab.errors import InputError
from qlab.progress import Progress
from qlab.quantization import Quantizer
from qlab.sim import SQNR, Measurement, QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation, evaluation_of
from qlab.sim.workers import Workers
from qlab.techniques.lagrangian import sweep, within
from qlab.techniques.mixed_precision_front import Front, Point
from qlab.techniques.mixed_precision_groups import Group, Key, groups_of

if TYPE_CHECKING:
    from qlab.techniques.mixed_precision import MixedPrecision

METRICS = {"size": ("size [KiB]", 8 * 1024), "bit_operations": ("bit operations [10^6]", 1e6)}
"""What a configuration costs: the name of the cost, and its unit in bits or bit operations."""

_FLOAT_BITS = 32


class Search:
    """One search: costs, estimated losses, the sweep and the verification."""

    def __init__(
        self, settings: "MixedPrecision", sim: QuantSim, data: Batches, score: Any, progress: Progress
    ) -> None:
        self.settings, self.sim, self.progress = settings, sim, progress
        self.groups = groups_of(sim, settings.metric, settings.skip)
        if not self.groups:
            raise InputError("no layer has a quantized weight that may move: there is nothing to choose.")
        self.cost_name, self.unit = METRICS[settings.metric]
        self.evaluation: Evaluation = SQNR(data) if score is None else evaluation_of(score)
        self.widths: dict[Key, int] = {key: self._quantizer(key).bits for group in self.groups for key in group.keys}
        self.noise, self.rest, self.notes = self._estimate(data)

    def front(self) -> Front:
        """The front; raises InputError where the budget is below the cheapest configuration."""
        options = [
            [(self._cost(group, bits), self._loss(group, bits)) for bits in self.settings.bits] for group in self.groups
        ]
        limit = sum(self._cost(group, self.settings.budget) for group in self.groups)
        choice = within(options, limit * (1 + 1e-9))
        if choice is None:
            least = min(self.settings.bits)
            raise InputError(
                f"budget={self.settings.budget:g} bits is below the least width, {least}: no configuration costs that "
                "little."
            )
        picks = {c.picks: "predicted" for c in sweep(options)}
        chosen = self._point(choice.picks, "predicted")
        evenly = [round(i * (len(picks) - 1) / (self.settings.verify + 1)) for i in range(1, self.settings.verify + 1)]
        wanted = {list(picks)[i] for i in evenly} | {choice.picks}
        picks.setdefault(choice.picks, "predicted")
        for number, _ in enumerate(self.settings.bits):
            picks[(number,) * len(self.groups)] = "uniform"
        points = [self._point(p, kind) for p, kind in picks.items()]
        points.append(self._current())
        truly = [p for p in points if p.kind != "predicted" or self._picks(p) in wanted]
        scores: dict[tuple[tuple[str, str, int], ...], Measurement] = {}
        for number, (point, score) in enumerate(self._evaluated(list({p.settings: p for p in truly}.values()))):
            self.progress.step(number, len(truly), f"verify {point.label}")
            scores[point.settings] = score
        points = [self._with_score(point, scores.get(point.settings)) for point in points]
        points.sort(key=lambda point: (point.cost, -point.predicted))
        best = self._best([p for p in points if p.cost <= limit * (1 + 1e-9) and p.kind != "current"], chosen.settings)
        self._compare_with_one_width(best)
        return Front(tuple(points), best, limit, self.cost_name, self.evaluation.name, tuple(self.notes))

    def _best(self, allowed: list[Point], wanted: tuple[tuple[str, str, int], ...]) -> Point:
        """The estimate's choice, or a verified point whose score is better by more than the standard error."""
        chosen = next(point for point in allowed if point.settings == wanted)
        scored = [p for p in allowed if p.score is not None and not math.isnan(p.score)]
        best = max(scored, key=lambda p: (float(p.score or 0), p.predicted), default=chosen)
        if chosen.score is None or best is chosen:
            return best
        doubt = chosen.score.standard_error or 0.0
        if float(best.score or 0) <= chosen.score + doubt and not math.isnan(chosen.score):
            return chosen
        self.notes.append(f"{best.label} was truly better than the estimate's choice, {chosen.label}.")
        return best

    def _compare_with_one_width(self, best: Point) -> None:
        """Changes the notes: says where one width of the budget throughout, which is not offered, is truly better."""
        width = round(self.settings.budget)
        if width in self.settings.bits or width != self.settings.budget or best.score is None:
            return
        settings = tuple((*key, width) for group in self.groups for key in group.keys)
        score = self._verified(replace(best, settings=settings))
        if score > best.score:
            self.notes.append(
                f"{width} bits throughout cost the same and are better, {self.evaluation.name} {score} against "
                f"{best.score}: add {width} to the widths {self.settings.bits} where the target has it."
            )

    def _estimate(self, data: Batches) -> tuple[dict[tuple[Key, int], float], float, list[str]]:
        """Noise to signal of the result from each tensor at each width, that of all that stays, and notes."""
        table = estimate_sensitivity(
            self.sim, list(data), self.settings.bits, probes=1, seed=self.settings.seed, progress=self.progress
        )
        noise: dict[tuple[Key, int], float] = {}
        rest, unknown = 0.0, []
        for row in table.itertuples():
            key = (row.layer, row.part)
            quantizer = self._quantizer(key)
            if not quantizer.enabled or str(quantizer.granularity) != row.granularity:
                continue
            ratio = 10 ** (-row.sqnr / 10)
            if math.isnan(ratio):
                unknown.append(f"{row.layer} {row.part}")
                ratio = 0.0
            if row.is_set and key not in self.widths:
                rest += ratio
            elif row.is_set or (key, row.bits) not in noise:  # as it is set comes first, with its rounding
                noise[key, row.bits] = ratio
        notes = []
        if unknown:
            names = ", ".join(dict.fromkeys(unknown))
            notes.append(f"no estimate for {names}: counted as without loss.")
        return noise, rest, notes

    def _quantizer(self, key: Key) -> Quantizer:
        quantizer = self.sim.quantizers[f"{key[0]}:{key[1]}".replace(".", "/")]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _cost(self, group: Group, bits: float) -> float:
        if self.settings.metric == "size":
            return group.work * bits / self.unit
        is_read = any(part == "output" for _, part in group.keys)
        return group.work * bits * (bits if is_read else _FLOAT_BITS) / self.unit

    def _loss(self, group: Group, bits: int) -> float:
        return sum(self.noise.get((key, bits), 0.0) for key in group.keys)

    def _point(self, picks: Sequence[int], kind: str) -> Point:
        widths = [self.settings.bits[pick] for pick in picks]
        pairs = list(zip(self.groups, widths, strict=True))
        counts = {bits: widths.count(bits) for bits in self.settings.bits if bits in widths}
        label = " + ".join(f"{count} x {bits} bits" for bits, count in counts.items())
        if len(counts) == 1:
            label = f"{widths[0]} bits"
        return Point(
            sum(self._cost(group, bits) for group, bits in pairs),
            _decibel(self.rest + sum(self._loss(group, bits) for group, bits in pairs)),
            kind,
            label,
            {group.name: bits for group, bits in pairs},
            tuple((*key, bits) for group, bits in pairs for key in group.keys),
        )

    def _current(self) -> Point:
        cost = loss = 0.0
        for group in self.groups:
            width = {part: self.widths[name, part] for name, part in group.keys}
            each = group.work * width["weight"]
            cost += each / self.unit if self.settings.metric == "size" else each * width.get("output", 32) / self.unit
            loss += sum(self.noise.get((key, self.widths[key]), 0.0) for key in group.keys)
        configuration = {group.name: self.widths[group.name, "weight"] for group in self.groups}
        settings = tuple((*key, self.widths[key]) for group in self.groups for key in group.keys)
        return Point(cost, _decibel(self.rest + loss), "current", "as it is set", configuration, settings)

    def _picks(self, point: Point) -> tuple[int, ...]:
        return tuple(self.settings.bits.index(point.configuration[group.name]) for group in self.groups)

    def _evaluated(self, points: list[Point]) -> Iterator[tuple[Point, Measurement]]:
        """Each point with its true score, from workers where there are some."""
        if self.settings.executor is None:
            yield from ((point, self._verified(point)) for point in points)
            return
        with torch.no_grad():
            self.evaluation.prepare(self.sim)
        workers = Workers(self.settings.executor, (self.sim, self.evaluation))
        found = workers.map(_evaluate, points, lambda: self.progress.step(0, len(points), "verify on workers"))
        yield from zip(points, found, strict=True)
        if workers.lost:
            self.notes.append(
                f"{workers.lost} evaluations were lost by workers and made again here ({workers.reason})."
            )

    def _verified(self, point: Point) -> Measurement:
        return _evaluate((self.sim, self.evaluation), point)

    def _with_score(self, point: Point, score: Measurement | None) -> Point:
        kind = "verified" if point.kind == "predicted" and score is not None else point.kind
        return replace(point, score=score, kind=kind)


def _evaluate(shared: tuple[QuantSim, Evaluation], point: Point) -> Measurement:
    """The true score of one point; the sim is not changed."""
    sim, evaluation = shared
    twin = shadow(sim)
    point.apply(twin)
    return twin.evaluate(evaluation)


def _decibel(ratio: float) -> float:
    return -10 * math.log10(ratio) if ratio > 0 else math.inf
