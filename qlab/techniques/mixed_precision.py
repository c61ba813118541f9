"""Mixed precision: bits where they matter. One pass over data estimates what every layer loses at every width.

The whole front of cost against loss follows from those numbers by a Lagrangian sweep; what is chosen, and some of the
rest, is verified by true evaluations, because the errors of layers do not simply add up.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qlab.analysis.estimate import estimate_sensitivity
from qlab.analysis.shadow import require_calibrated, set_bits, shadow
from qlab.errors import InputError
from qlab.graph import Layer
from qlab.progress import Progress, Silent
from qlab.quantization import Quantizer, QuantSpec
from qlab.settings import SettingError, setting
from qlab.sim import SQNR, Measurement, QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation, evaluation_of
from qlab.sim.placement import matches_glob
from qlab.sim.workers import Workers
from qlab.techniques.lagrangian import sweep, within
from qlab.techniques.technique import Report, Technique

if TYPE_CHECKING:
    import pandas as pd

METRICS = {"size": ("size [KiB]", 8 * 1024), "bit_operations": ("bit operations [10^6]", 1e6)}
_FLOAT_BITS = 32
Key = tuple[str, str]  # a quantizer: layer, part


@dataclass(frozen=True)
class Point:
    """One configuration: bits by layer, what it costs and how good it is.

    kind: 'predicted', 'verified', 'uniform' (one width for all) or 'current' (the sim as it was given). predicted: the
    estimated SQNR of the result [dB]. score: truly measured, None where it was not. settings: (layer, part, bits) of
    every quantizer concerned.
    """

    cost: float
    predicted: float
    kind: str
    label: str
    configuration: dict[str, int]
    settings: tuple[tuple[str, str, int], ...]
    score: Measurement | None = None

    def apply(self, sim: QuantSim) -> None:
        """Changes `sim`: sets these bits. A rounding chosen for other bits is dropped."""
        for layer, part, bits in self.settings:
            quantizer = getattr(sim[layer], part)
            set_bits(quantizer, bits)


@dataclass(frozen=True)
class Front:
    """Configurations by rising cost, with the budget's choice.

    points: the sweep's, those of one width, and the sim as it was. chosen: the best verified one within the budget.
    budget: in units of cost. notes: what was left out, and why.
    """

    points: tuple[Point, ...]
    chosen: Point
    budget: float
    cost_name: str
    score_name: str
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> "pd.DataFrame":
        """One row a point: cost, score, error, kind, label, predicted [dB], verified, is_chosen, configuration.

        `verified` is the true score, NaN where there is none; there `score` is interpolated, by predicted SQNR, between
        those that were verified.
        """
        import numpy as np
        import pandas as pd

        verified_points = [p for p in self.points if p.score is not None and math.isfinite(p.score)]
        known = np.array(sorted((p.predicted, float(p.score or 0)) for p in verified_points)).reshape(-1, 2)
        rows = []
        for point in self.points:
            verified = math.nan if point.score is None else float(point.score)
            guess = float(np.interp(point.predicted, known[:, 0], known[:, 1])) if len(known) else math.nan
            error = None if point.score is None else point.score.standard_error
            rows.append(
                {
                    "cost": point.cost,
                    "score": guess if point.score is None else verified,
                    "error": math.nan if error is None else error,
                    "kind": point.kind,
                    "label": point.label,
                    "predicted": point.predicted,
                    "verified": verified,
                    "is_chosen": point is self.chosen,
                    "configuration": point.configuration,
                }
            )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """The front as a figure: cost against score."""
        from qlab.plots import pareto

        return pareto(self.to_pandas(), cost_name=self.cost_name, score_name=self.score_name)

    def __repr__(self) -> str:
        verified = sum(point.score is not None for point in self.points)
        return f"Front({len(self.points)} configurations, {verified} verified, chosen: {self.chosen.label})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {**self.plot()._repr_mimebundle_(), "text/plain": repr(self)}


@dataclass(frozen=True)
class MixedPrecision(Technique):
    """Gives each layer the bits that it needs: the least loss at no more than a budget's cost.

    metric 'size' moves weights, at a cost of numel * bits; activations stay as they are set. 'bit_operations' moves the
    weights of a layer together with the activation that they multiply, at multiply-accumulates * bits * bits. What
    shares a grid (tied weights, all readers of one activation) has one width. budget: the cost of the same model at
    this many bits throughout, fractions allowed.

    One pass over `batches` estimates the noise in the result from every tensor at every width; a Lagrangian sweep
    turns that into the whole front; the budget's choice, `verify` further points, every single width and the sim as it
    was are truly evaluated with `score` (SQNR without one), and the best within the budget is taken. With the budget's
    own width among `bits` that is no worse, within the standard error, than this width throughout; without it the notes
    say by how much it is. The sweep is as quick with many widths as with few; name those that the target computes with,
    for a file stores 5, 6 or 7 bits in 8.
    Report.values['front'] is the table of all points, `front` gives them without changing the sim.

    When: before AdaRound and its kin, whose roundings belong to one width. Cost: about eight forwards of the batches
    and one evaluation for each verified point.

    Sources: Shoham and Gersho 1988, doi.org/10.1109/29.90373; Dong et al. 2020, arXiv:1911.03852 (HAWQ-V2).
    """

    bits: Any = setting((4, 5, 6, 7, 8, 16), "widths to choose from, such as 4, 8, 16")  # noqa: RUF009
    budget: float = setting(6.0, "cost at most that of one width throughout", minimum=2.0, maximum=16.0, unit="bits")
    metric: str = setting("size", "what a configuration costs", choices=tuple(METRICS))
    skip: Any = setting((), "globs of layers that keep their bits")  # noqa: RUF009
    verify: int = setting(3, "points of the front to evaluate beside the chosen one", minimum=0, maximum=50)
    seed: int = setting(0, "of the estimate's random directions", minimum=0)
    executor: Any = setting(  # noqa: RUF009
        None, "workers (concurrent.futures, dask) for the evaluations of points", hidden=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", _widths(self.bits))
        globs = self.skip.split(",") if isinstance(self.skip, str) else self.skip
        object.__setattr__(self, "skip", tuple(glob.strip() for glob in globs if glob.strip()))

    def front(
        self, sim: QuantSim, batches: Any, score: "Evaluation | Any" = None, progress: Progress | None = None
    ) -> Front:
        """The front of `sim`, which is not changed; arguments as in `apply`. Raises InputError without data, where
        nothing can move, and for a budget below the cheapest configuration."""
        data = self._data(batches)
        assert data is not None
        if next(iter(data), None) is None:
            raise InputError("MixedPrecision needs at least one batch; the iterable was empty.")
        require_calibrated(sim)
        return _Search(self, sim, data, score, progress or Silent()).front()

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: sets the chosen bits."""
        front = self.front(sim, batches, score, progress)
        chosen = front.chosen
        rows = []
        for layer, part, bits in chosen.settings:
            before = getattr(sim[layer], part).bits
            rows.append({"layer": layer, "part": part, "bits": bits, "before": before})
        chosen.apply(sim)
        summary = (
            f"{chosen.label} at {chosen.cost:.4g} of {front.budget:.4g} {front.cost_name}: {front.score_name} "
            f"{chosen.score}, {chosen.predicted:.1f} dB predicted"
        )
        values = {
            "front": front.to_pandas(),
            "configuration": dict(chosen.configuration),
            "cost": chosen.cost,
            "budget": front.budget,
            "predicted": chosen.predicted,
            "score": None if chosen.score is None else float(chosen.score),
        }
        return Report("MixedPrecision", summary, tuple(rows), front.notes, values)


@dataclass(frozen=True)
class Group:
    """Quantizers that have one width. name: the first layer's. work: what cost multiplies: numbers, or MACs."""

    name: str
    keys: tuple[Key, ...]
    work: float


def groups_of(sim: QuantSim, metric: str, skip: Iterable[str] = ()) -> list[Group]:
    """What moves together under a metric, in order of execution; skipped layers take their group with them."""
    entries = [e for e in sim.placed.values() if e.weight is not None and e.weight.enabled and not e.carries_weight]
    roots: dict[int, int] = {}
    members: dict[int, Quantizer] = {}

    def root(key: int) -> int:
        while roots.setdefault(key, key) != key:
            key = roots[key]
        return key

    work: dict[int, float] = {}  # by the weight quantizer of a layer
    for entry in entries:
        weight = entry.weight
        assert weight is not None
        members[id(weight)] = weight
        if metric == "size":
            work[id(weight)] = float(weight.weight.numel())
            continue
        work[id(weight)] = work.get(id(weight), 0.0) + multiply_accumulates(entry.layer)
        read = sim.input_quantizer(entry.layer)
        if read is not None and read.enabled:
            members[id(read)] = read
            roots[root(id(read))] = root(id(weight))
    together: dict[int, list[Quantizer]] = {}
    for key, quantizer in members.items():
        together.setdefault(root(key), []).append(quantizer)
    parts = {id(q): key.rpartition(":")[2] for key, q in sim.quantizers.items()}
    found = []
    for quantizers in together.values():
        keys = tuple((q.name, parts[id(q)]) for q in quantizers)
        if any(matches_glob(name, glob) for name, _ in keys for glob in skip):
            continue
        name = next(name for name, part in keys if part == "weight")
        found.append(Group(name, keys, sum(work.get(id(q), 0.0) for q in quantizers)))
    return found


def multiply_accumulates(layer: Layer) -> float:
    """Multiply-accumulates of one sample in a layer with a weight; a size that may change counts as 1."""
    source = layer.weight_source
    if source is None or layer.kind == "embedding":
        return 0.0
    weight, axis = getattr(source[0], source[1]), source[2]
    if layer.kind == "conv_transpose":  # every input meets the kernel of its channel
        return _elements(layer.inputs[0]) * weight.numel() / weight.shape[0]
    return _elements(layer) * weight.numel() / weight.shape[axis]


def _elements(layer: Layer) -> float:
    return float(math.prod(size or 1 for size in layer.shape or ()))


class _Search:
    """One search: costs, estimated losses, the sweep and the verification."""

    def __init__(self, settings: MixedPrecision, sim: QuantSim, data: Batches, score: Any, progress: Progress) -> None:
        self.settings, self.sim, self.progress = settings, sim, progress
        self.groups = groups_of(sim, settings.metric, settings.skip)
        if not self.groups:
            raise InputError("no layer has a quantized weight that may move: there is nothing to choose.")
        self.cost_name, self.unit = METRICS[settings.metric]
        self.evaluation: Evaluation = SQNR(data) if score is None else evaluation_of(score)
        self.widths: dict[Key, int] = {key: self._quantizer(key).bits for group in self.groups for key in group.keys}
        self.noise, self.rest, self.notes = self._estimate(data)

    def front(self) -> Front:
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


def _widths(value: Any) -> tuple[int, ...]:
    """The widths of a list, a single number or text such as '4, 8', rising."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        found = {QuantSpec(bits=int(part)).bits for part in parts}
    except (ValueError, TypeError) as error:
        raise SettingError(f"MixedPrecision(bits=...) must be widths from 2 to 16, such as (4, 8); {error}") from None
    if not found:
        raise SettingError("MixedPrecision(bits=...) must hold at least one width, such as (4, 8).")
    return tuple(sorted(found))


def _decibel(ratio: float) -> float:
    return -10 * math.log10(ratio) if ratio > 0 else math.inf
