"""The walk that AdaRound, GPTQ and SequentialMSE share: layer by layer, each seeing the rounded ones before it.

Data are read once; finished layers can be kept on disk; moments stay with the sim, so that a layer whose bits, scheme,
granularity or rule are changed later is rounded again without data.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from qlab.analysis.moment_store import InputKeys, MomentStore
from qlab.analysis.moments import MomentSums
from qlab.errors import InputError, UnknownLayer, nearest
from qlab.graph import Layer, LinearForm, linear_form
from qlab.progress import Progress
from qlab.quantization import WeightQuantizer
from qlab.sim import Batches, QuantSim
from qlab.sim.content import content_keys
from qlab.sim.placement import matches_glob
from qlab.sim.streaming import Stop, stream
from qlab.techniques.rounding_cache import RoundingCache
from qlab.techniques.rounding_task import RoundingTask, task_of
from qlab.techniques.technique import Report

_BYTES_AN_ENTRY = 32  # of a Gram matrix: kept in float32, with factors in float64

Choose = Callable[[RoundingTask, Callable[[str], None]], str]
"""Changes the task's quantizer and returns a word for how; the second argument reports a step."""


@dataclass(frozen=True)
class Plan:
    """What the walk needs to know of a technique.

    name: the technique's. layers: globs. settings: everything that the result depends on, as text. max_bytes: for
    activations, and again for moments.
    """

    name: str
    layers: tuple[str, ...]
    settings: str
    max_rows: int
    max_bytes: int
    seed: int
    cache_dir: str | None

    @classmethod
    def of(cls, technique: Any) -> "Plan":
        """The plan of a technique with the settings layers, max_rows, memory (MiB), seed and cache_dir."""
        settings = repr(replace(technique, layers=(), cache_dir=None))
        name, t = type(technique).__name__, technique
        return cls(name, t.layers, settings, t.max_rows, t.memory << 20, t.seed, t.cache_dir)


def globs(asked: str | Iterable[str]) -> tuple[str, ...]:
    """Globs as a person gives them: one, several comma separated, or a sequence.

    >>> globs("layer1.*, fc")
    ('layer1.*', 'fc')
    """
    parts = asked.split(",") if isinstance(asked, str) else asked
    return tuple(part.strip() for part in parts if part.strip())


def round_layers(plan: Plan, choose: Choose, sim: QuantSim, batches: Batches | None, progress: Progress) -> Report:
    """Changes `sim`: rounds the weights of the layers that the plan names. Without batches, again from moments."""
    walk = _Walk(plan, choose, sim, progress)
    if not walk.names:
        return Report(plan.name, "no layer has a quantized weight that can be rounded", notes=walk.notes())
    return walk.again() if batches is None else walk.through(batches)


class _Walk:
    def __init__(self, plan: Plan, choose: Choose, sim: QuantSim, progress: Progress) -> None:
        self.plan, self.choose, self.sim, self.progress = plan, choose, sim, progress
        self.names, self._left, self._shared = _roundable(sim, plan.layers)
        self._keys = content_keys(sim, quantized=False)
        self._inputs = InputKeys(sim)
        self._store = MomentStore.of(sim)
        self._rows: dict[str, dict[str, Any]] = {}
        self._unkept: list[str] = []
        self._corrected = [name for name in self.names if self._is_corrected(name)]

    def through(self, batches: Batches) -> Report:
        """Rounds every layer, with the data; those found in the cache are taken from there."""
        cache, keys = RoundingCache.at(self.plan.cache_dir), {}
        if cache is not None:
            keys = self._cache_keys(batches)
            for name in self.names:
                if (row := cache.load(keys[name], self._quantizer(name))) is not None:
                    self._rows[name] = row
        found = len(self._rows)
        waiting = [name for name in self.names if name not in self._rows]
        for stop in stream(self.sim, batches, waiting, self.progress, self.plan.max_bytes):
            name = stop.layer.name
            self._round(self._task(stop), stop.position, stop.total)
            if cache is not None:
                cache.save(keys[name], self._quantizer(name), self._rows[name])
        notes = []
        if found:
            notes.append(
                f"{found} layers were taken from {self.plan.cache_dir}; no moments of them are kept: when their bits "
                "change, data are needed again."
            )
        if cache is not None and cache.damaged:
            notes.append(
                f"{cache.damaged} files of {self.plan.cache_dir} were damaged; their layers were rounded anew."
            )
        if cache is not None and cache.refused:
            notes.append(
                f"{cache.refused} layers could not be kept in {self.plan.cache_dir}: {cache.reason}. A rerun rounds "
                "them anew."
            )
        return self._report(notes)

    def again(self) -> Report:
        """Rounds the layers without a rounding in force, from moments of an earlier run."""
        lost = [name for name in self.names if self._quantizer(name).rounding is None]
        known = {name: m for name in lost if (m := self._store.find(name, self._keys[name])) is not None}
        if lost and not known:
            raise InputError(
                f"{self.plan.name} needs data: no moments are kept of {lost[0]!r}"
                + (f" and {len(lost) - 1} more layers" if len(lost) > 1 else "")
                + f" that belong to the weights as they are now. Run {self.plan.name}().apply(sim, batches) with any "
                "iterable of inputs."
            )
        moved = []
        for position, (name, moments) in enumerate(known.items()):
            layer = self.sim.graph[name]
            form = linear_form(layer)
            assert form is not None
            if not self._store.are_of(name, self._inputs.of(_read(layer, form))):
                moved.append(name)
                moments = moments.of_equal_inputs(form.matrix(self._quantizer(name).weight.detach()))
            task = task_of(self.sim, name, moments, None, name in self._shared, self.plan.max_bytes)
            self._round(task, position, len(known))
        missing = [name for name in lost if name not in known]
        notes = ["rounded again from the moments of an earlier run, without data."] if known else []
        if moved:
            notes.append(
                "layers before them have been rounded otherwise since, so they make up for no error but their own: "
                f"{', '.join(moved)}. With data they would."
            )
        if missing:
            notes.append(
                f"round to nearest, for no moments of them are kept: {', '.join(missing)}. Give data to apply."
            )
        return self._report(notes)

    def notes(self, more: Iterable[str] = ()) -> tuple[str, ...]:
        """What was left out, and why."""
        told = list(more)
        for reason in dict.fromkeys(self._left.values()):
            names = [name for name, why in self._left.items() if why == reason]
            told.append(f"not rounded, {reason}: {', '.join(names)}.")
        if self._corrected:
            told.append(
                f"an earlier bias correction went with the rounding that it was made for: {', '.join(self._corrected)}."
            )
        if self._unkept:
            told.append(
                f"there is no room to keep the moments of {', '.join(self._unkept)}: when their bits change, data are "
                "needed again."
            )
        return tuple(told)

    def _is_corrected(self, name: str) -> bool:
        quantizer = self._quantizer(name)
        return quantizer.bias_correction is not None and not quantizer.is_corrected_by_rounding

    def _quantizer(self, name: str) -> WeightQuantizer:
        quantizer = self.sim.placed[name].weight
        assert quantizer is not None
        return quantizer

    def _task(self, stop: Stop) -> RoundingTask:
        """The task of the next layer, with its moments over all batches."""
        name, plan = stop.layer.name, self.plan
        form = linear_form(stop.layer)
        assert form is not None
        moments = None
        if _BYTES_AN_ENTRY * form.groups * form.inputs**2 <= plan.max_bytes:
            sums = MomentSums(stop.layer, stop.batches, plan.max_rows, plan.seed)
            for x, xh in stop.inputs(form.operand):
                chosen = sums.choose(x)
                sums.add(sums.form.rows(x, chosen), sums.form.rows(xh, chosen))
            moments = sums.moments()
            if moments is None:
                raise InputError(
                    f"no batch reaches layer {name!r}: {plan.name} needs at least one batch with at least one sample."
                )
            inputs = self._inputs.of(_read(stop.layer, form))
            if not self._store.keep(name, self._keys[name], inputs, moments, plan.max_bytes):
                self._unkept.append(name)
        return task_of(self.sim, name, moments, stop, name in self._shared, plan.max_bytes)

    def _round(self, task: RoundingTask, position: int, total: int) -> None:
        quantizer, name = task.quantizer, task.layer.name

        def report(what: str) -> None:
            self.progress.step(position, total, f"{name}: {what}")

        report("rounding")
        before = task.signal_to_noise()
        scale = quantizer.required_encoding().scale
        form = self.choose(task, report)
        self._rows[name] = {
            "layer": name,
            "kind": task.layer.title,
            "bits": quantizer.bits,
            "form": form,
            "sqnr_before": before,
            "sqnr_after": task.signal_to_noise(),
            "moved": task.moved(),
            "scale": float((quantizer.required_encoding().scale / scale).mean()),
        }

    def _report(self, notes: list[str]) -> Report:
        rows = [self._rows[name] for name in self.names if name in self._rows]
        gains = [row["sqnr_after"] - row["sqnr_before"] for row in rows]
        gains = [gain for gain in gains if math.isfinite(gain)]
        gain = sum(gains) / len(gains) if gains else 0.0
        summary = f"{len(rows)} of {len(self.names)} layers; {gain:.1f} dB gained in their outputs on average"
        if not rows:
            summary = "every rounding is in force: nothing to do"
        counts = Counter(row["form"] for row in rows)
        return Report(self.plan.name, summary, tuple(rows), self.notes(notes), {"gain_db": gain, "forms": dict(counts)})

    def _cache_keys(self, batches: Batches) -> dict[str, str]:
        """The key of each layer's result: settings, data, and the sim up to the layer as it is before anything."""
        return RoundingCache.keys(self.plan.settings, self.sim, self.names, batches)


def _read(layer: Layer, form: LinearForm) -> Layer:
    """The layer whose value the weight is multiplied with."""
    source = layer.args[form.operand]
    assert isinstance(source, Layer)
    return source


def _roundable(sim: QuantSim, patterns: tuple[str, ...]) -> tuple[list[str], dict[str, str], set[str]]:
    """(names in order of execution, why others are left, names whose weight other layers use as well)."""
    for pattern in patterns:
        if not any(matches_glob(name, pattern) for name in sim.placed):
            raise UnknownLayer(f"layers={pattern!r} matches no layer. {nearest(pattern, sim.placed)}")
    names: list[str] = []
    left: dict[str, str] = {}
    shared: set[str] = set()
    first: dict[int, str] = {}
    for name, entry in sim.placed.items():
        if entry.weight is None or entry.carries_weight or not any(matches_glob(name, p) for p in patterns):
            continue
        form = linear_form(entry.layer)
        if not entry.weight.enabled:
            left[name] = "for their weights are not quantized"
        elif form is None:
            left[name] = "for they are no product with a weight of their own"
        elif id(entry.weight) in first:
            shared |= {name, first[id(entry.weight)]}
            left[name] = "for they use the weight of a layer before them"
        else:
            first[id(entry.weight)] = name
            names.append(name)
    return names, left, shared
