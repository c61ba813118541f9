"""How good the sim is, in three strengths: estimates at once, true values on probe batches, the score on all data.

`Scoreboard` measures in pieces that an edit may interrupt: it takes the lock for one layer at a time, and stops when
the sim is no longer what it began to measure.
"""

import html as _html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.graph import Layer, Replay, call_layer
from qlab.graph.layer_graph import Call
from qlab.lab.jobs import EngineLock, Job
from qlab.sim import SQNR, Agreement, Evaluation, Measurement, QuantSim, Role
from qlab.sim.evaluate import evaluate

SCORE_KEYS = ("sqnr", "agreement", "score")


class Superseded(Exception):
    """What was being measured is no longer there."""


@dataclass(frozen=True)
class ScoreRow:
    """One score: of the float model, of the quantized one, and on what it was measured.

    key: 'sqnr', 'agreement' or 'score'. quantized: None before the first measurement. is_stale: it belongs to an
    earlier state of the sim.
    """

    key: str
    name: str
    data: str
    float_value: Measurement | None
    quantized: Measurement | None
    is_stale: bool

    @property
    def change(self) -> float | None:
        """Quantized minus float, None where one is missing or the float value is infinite."""
        if self.float_value is None or self.quantized is None or not math.isfinite(self.float_value):
            return None
        return float(self.quantized) - float(self.float_value)


@dataclass(frozen=True)
class Scores:
    """All scores of one state; iterate, or take one by key or name: `scores['sqnr'].quantized`."""

    rows: tuple[ScoreRow, ...]

    @property
    def are_stale(self) -> bool:
        """Whether any of them belongs to an earlier state."""
        return any(row.is_stale for row in self.rows)

    def __iter__(self) -> Iterator[ScoreRow]:
        return iter(self.rows)

    def __getitem__(self, key: str) -> ScoreRow:
        for row in (*(r for r in self.rows if r.key == key), *(r for r in self.rows if r.name == key)):
            return row
        raise KeyError(f"there is no score {key!r}; there are {[row.key for row in self.rows]}.")

    def to_pandas(self) -> pd.DataFrame:
        """One row a score."""
        columns = ("name", "data", "float", "quantized", "change", "low", "high", "samples", "is_stale")
        return pd.DataFrame([_plain_row(row) for row in self.rows], columns=columns)

    def __repr__(self) -> str:
        return "\n".join(
            f"{row.name} ({row.data}): float {_shown(row.float_value)}, quantized {_shown(row.quantized)}"
            + (", stale" if row.is_stale else "")
            for row in self.rows
        )

    def _repr_html_(self) -> str:
        body = "".join(
            "<tr>" + "".join(f"<td>{_html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows
        )
        head = "".join(f"<th>{cell}</th>" for cell in ("score", "on", "float", "quantized", "change", ""))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Scoreboard:
    """Measures one sim. `version` counts its changes; whoever changes the sim under the lock adds one."""

    def __init__(
        self, sim: QuantSim, probe: Sequence[Any], score: Evaluation | None, lock: EngineLock, max_bytes: int
    ) -> None:
        self.version = 0
        self.score = score
        self.probe = list(probe)
        self._sim, self._lock = sim, lock
        self._sqnr, self._agreement = SQNR(self.probe), Agreement(self.probe)
        for evaluation in (self._sqnr, self._agreement, *([score] if score is not None else [])):
            evaluation.prepare(sim)  # the float model as it is now, before a technique changes weights
        self.float_values: dict[str, Measurement] = {}
        self._call: Callable[..., Any] = sim.call
        self.replay = Replay(
            sim.graph,
            [sim.inputs(batch) for batch in self.probe],
            lambda layer, args, kwargs: self._call(layer, args, kwargs),
            sim.fingerprint,
            keeps=lambda layer: sim.placed[layer.name].role is not Role.FUSED,
            max_bytes=max_bytes,
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The scores that there are."""
        return SCORE_KEYS if self.score is not None else SCORE_KEYS[:2]

    def measure_probe(self, job: Job) -> dict[str, Measurement]:
        """SQNR and agreement of the model's output on the probe batches, re-running only what has changed."""
        call, self._call = self._call, self._interruptible(self._sim.call, job)
        try:
            with torch.no_grad():
                outputs = []
                for index in range(len(self.probe)):
                    job.step(index, len(self.probe), "probe batches")
                    outputs.append(self.replay.output(index))
        finally:
            self._call = call
        found = {}
        for key, evaluation in (("sqnr", self._sqnr), ("agreement", self._agreement)):
            found[key] = evaluation.of_outputs(self._sim, outputs)
            if key not in self.float_values:
                perfect = [self._sim.float_output(batch) for batch in self.probe]
                self.float_values[key] = evaluation.of_outputs(self._sim, perfect)
        return found

    def measure_score(self, job: Job) -> Measurement:
        """The person's score on all its data."""
        assert self.score is not None
        self.measure_float(job)
        return evaluate(self._twin(job, self._sim.call), self.score, quantized=True)

    def measure_float(self, job: Job) -> None:
        """The float model's score, measured once: before a technique changes weights."""
        if self.score is not None and "score" not in self.float_values:
            self.float_values["score"] = evaluate(self._twin(job, call_layer), self.score, quantized=True)

    def measure_noise(self, job: Job) -> dict[str, float]:
        """SQNR in dB of every layer's value on the first probe batch, quantized against float, in one pass.

        Both models run side by side, layer by layer, so that no more is kept than a forward needs.
        """
        sim, found = self._sim, {}
        quantized = self._interruptible(sim.call, job)
        if sim.graph.runs_whole:
            return self._noise_of_whole(quantized)

        def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            exact = call_layer(layer, *_side((args, kwargs), 0))
            rounded = quantized(layer, *_side((args, kwargs), 1))
            if isinstance(exact, Tensor) and exact.is_floating_point() and layer.kind != "parameter":
                signal = float(exact.double().square().sum())
                noise = float((exact.double() - rounded.double()).square().sum())
                found[layer.name] = _decibel(signal, noise)
            return _Pair(exact, rounded)

        with torch.no_grad():
            sim.graph.run(sim.inputs(self.probe[0]), call)
        return found

    def _noise_of_whole(self, quantized: Call) -> dict[str, float]:
        """The same where layers run together only: the float model first, then the sim, call by call."""
        sim, flat = self._sim, self._sim.inputs(self.probe[0])
        exact: dict[str, list[Tensor]] = defaultdict(list)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

        def keep(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = call_layer(layer, args, kwargs)
            if isinstance(value, Tensor) and value.is_floating_point():
                exact[layer.name].append(value.clone())
            return value

        def compare(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = quantized(layer, args, kwargs)
            if exact[layer.name] and exact[layer.name][0].shape == value.shape:
                wanted = exact[layer.name].pop(0).double()
                sums[layer.name][0] += float(wanted.square().sum())
                sums[layer.name][1] += float((wanted - value.double()).square().sum())
            return value

        with torch.no_grad():
            sim.graph.run(flat, keep)
            sim.graph.run(flat, compare)
        return {name: _decibel(signal, noise) for name, (signal, noise) in sums.items()}

    def _twin(self, job: Job, call: Call) -> QuantSim:
        """The same sim, each layer computed by `call`, which can be interrupted between layers while it is scored."""
        twin = QuantSim.__new__(QuantSim)
        twin.__dict__.update(self._sim.__dict__)
        batches, done = getattr(self.score, "batches", None), count()
        guarded = self._interruptible(call, job)

        def run(flat: Any) -> Any:  # in place of the sim's own, which knows no `call` and no interruption
            return twin.graph.run(flat, guarded)

        def output(batch: Any) -> Any:
            job.step(next(done), 0 if batches is None else len(batches), "all data")
            return QuantSim.output(twin, batch)

        twin.__dict__.update(call=guarded, run=run, output=output)
        return twin

    def _interruptible(self, call: Call, job: Job) -> Call:
        version = self.version

        def guarded(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            job.check()
            with self._lock:
                if self.version != version:
                    raise Superseded
                return call(layer, args, kwargs)

        return guarded


@dataclass(frozen=True)
class _Pair:
    """The float and the quantized value of one layer."""

    exact: Any
    rounded: Any


def _side(values: Any, side: int) -> Any:
    return pytree.tree_map(
        lambda value: (value.exact, value.rounded)[side] if isinstance(value, _Pair) else value,
        values,
        is_leaf=lambda value: isinstance(value, _Pair),
    )


def score_rows(
    board: Scoreboard, measured: dict[str, Measurement], earlier: dict[str, Measurement]
) -> tuple[ScoreRow, ...]:
    """The rows to show: what was measured in this state, else what was measured last, marked stale."""
    batches = len(board.probe)
    probe = f"{batches} probe batch" + ("es" if batches != 1 else "")
    names = {"sqnr": ("SQNR", probe), "agreement": ("agreement", probe)}
    if board.score is not None:
        names["score"] = (board.score.name, "all data")
    return tuple(
        ScoreRow(
            key, *names[key], board.float_values.get(key), measured.get(key, earlier.get(key)), key not in measured
        )
        for key in board.keys
    )


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _plain_row(row: ScoreRow) -> tuple[Any, ...]:
    low, high = (row.quantized.interval if row.quantized is not None else None) or (math.nan, math.nan)
    value = math.nan if row.quantized is None else float(row.quantized)
    exact = math.nan if row.float_value is None else float(row.float_value)
    change = math.nan if row.change is None else row.change
    samples = 0 if row.quantized is None else row.quantized.samples
    return row.name, row.data, exact, value, change, low, high, samples, row.is_stale


def _cells(row: ScoreRow) -> Iterable[str]:
    change = "" if row.change is None else f"{row.change:+.1%}" if _is_share(row) else f"{row.change:+.4g}"
    return row.name, row.data, _shown(row.float_value), _shown(row.quantized), change, "stale" if row.is_stale else ""


def _is_share(row: ScoreRow) -> bool:
    return row.quantized is not None and row.quantized.unit == "share"


def _shown(value: Measurement | None) -> str:
    return "not measured" if value is None else str(value)
