"""Does the target compute what the simulation says? An exported file run by ONNX Runtime, beside the sim.

With optimisations off the runtime computes the Q/DQ graph as it is written, in float; with them on, layers become
integer kernels, which `presets.onnxruntime` simulates: int32 biases, exact sums, one rounding.
"""

import html
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.export.compare_encodings import DIFFERS, compare_encodings
from qlab.export.kernels import kernel_table, layer_table
from qlab.export.runtime import Target, version
from qlab.graph import Layer
from qlab.progress import Progress, Silent
from qlab.quantization import quantize
from qlab.sim import Evaluation, Measurement, QuantSim, Role
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Score, evaluation_of, predictions

_SHARES = {"identical", "top_1"}
_LATENCY_ROUNDS = 7
_LATENCY_S = 1.0  # stop repeating after this


@dataclass(frozen=True, eq=False)
class OnTarget:
    """A file on target beside the sim that it was exported from.

    outputs: one row a result of the model: values, share `identical`, `largest` difference in quantization steps (NaN
    for a float result), `top_1` share of equal predictions. layers: as `layer_table` has it, None unless asked for.
    summary: size, latency and score, in columns float, simulated, on_target. notes: what else the person should know.
    """

    path: Path
    runtime: str
    optimised: bool
    outputs: pd.DataFrame
    layers: pd.DataFrame | None
    summary: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> float:
        """The share of all results' integers that are the sim's."""
        return float((self.outputs["identical"] * self.outputs["values"]).sum() / self.outputs["values"].sum())

    @property
    def top_1(self) -> float:
        """The share of predictions that are the sim's; NaN where the model predicts no class."""
        return float(self.outputs["top_1"].iloc[0])

    @property
    def kernels(self) -> pd.DataFrame | None:
        """The kernels that round differently given the same inputs; None unless layers were asked for."""
        return None if self.layers is None else kernel_table(self.layers)

    def __repr__(self) -> str:
        lines = [self._title(), _text(self.outputs), _text(self.summary)]
        if self.kernels is not None:
            lines.append(self._kernel_line())
            if len(self.kernels):
                lines.append(_text(self.kernels))
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self._title())}</b></p>", _table(self.outputs), _table(self.summary)]
        if self.kernels is not None:
            parts.append(f"<p>{html.escape(self._kernel_line())}</p>")
            parts.append(_table(self.kernels) if len(self.kernels) else "")
        if self.layers is not None:
            parts.append(f"<details><summary>{len(self.layers)} layers</summary>{_table(self.layers)}</details>")
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        return "".join(parts)

    def _title(self) -> str:
        mode = "optimised" if self.optimised else "optimisations off"
        return f"{self.path.name} on {self.runtime} ({mode}): {self.identical:.2%} of the integers are the sim's"

    def _kernel_line(self) -> str:
        assert self.kernels is not None
        if not len(self.kernels):
            return "Given the same inputs, every kernel rounds as the sim does."
        return "Kernels that round differently, given the same inputs:"


def on_target(
    sim: QuantSim,
    path: str | os.PathLike[str],
    batches: Any,
    score: Evaluation | Callable[[nn.Module], Any] | None = None,
    *,
    layers: bool = False,
    optimised: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> OnTarget:
    """Runs an exported file by ONNX Runtime on this machine's CPU and compares it with the sim. Changes nothing.

    path: the Q/DQ file; path.float.onnx beside it is timed for comparison. score: as in `sim.evaluate`, also taken of
    the file. layers: compare every layer, and name the kernels that round differently. optimised: with the runtime's
    integer kernels; False runs every operator as written. threads: of the runtime. Raises InputError where the file
    is not of this sim, or batches are empty.
    """
    file, data = Path(path), Batches(batches)
    evaluation = None if score is None else evaluation_of(score)
    progress = progress or Silent()
    target = Target(sim, file, optimised, threads)
    with sim.evaluating(), torch.no_grad():
        first, outputs = _compare_outputs(sim, target, data, progress)
        table = layer_table(sim, file, data, optimised, threads, progress) if layers else None
        rows = [_sizes(file), _latencies(sim, target, file, first, optimised, threads)]
        if evaluation is not None:
            progress.step(0, 1, f"{evaluation.name} on target")
            rows.append(_scores(sim, target, evaluation))
    columns = ["measure", "float", "simulated", "on_target"]
    notes = tuple(_notes(sim, file, optimised))
    return OnTarget(
        file, version(), optimised, outputs, table, pd.DataFrame(rows, columns=columns, dtype=object), notes
    )


def _compare_outputs(
    sim: QuantSim, target: Target, data: Batches, progress: Progress
) -> tuple[list[Any], pd.DataFrame]:
    first: list[Any] | None = None
    rows = [_OutputRow(sim, layer) for layer in target.outputs]
    for number, batch in enumerate(data):
        progress.step(number, max(len(data), number + 1), "running the file")
        flat = sim.inputs(batch)
        first = flat if first is None else first
        ours = target.results(sim.graph.run(flat, sim.call))
        for row, a, b in zip(rows, ours, target.run(flat), strict=True):
            row.add(a.cpu(), b)
    if first is None:
        raise InputError("there is nothing to compare: the iterable of batches is empty.")
    return first, pd.DataFrame([row.figures() for row in rows])


class _OutputRow:
    """Counts of one result over all batches."""

    def __init__(self, sim: QuantSim, layer: Layer) -> None:
        entry = sim.placed[layer.name]
        on_grid = entry.role in (Role.QUANTIZED, Role.INHERITS) and entry.output is not None and entry.output.enabled
        self._layer = layer
        self._grid = entry.output.required_encoding() if on_grid and entry.output is not None else None
        self._values = self._equal = self._predicted = self._agreed = 0
        self._largest = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape:
            raise InputError(
                f"result {self._layer.name!r} has shape {list(theirs.shape)} on target and {list(ours.shape)} in the "
                "sim: the file is of another model."
            )
        if self._grid is not None:
            grid = self._grid.to("cpu")
            steps = (quantize(ours, grid) - quantize(theirs, grid)).abs()
            self._largest = max(self._largest, float(steps.max()) if steps.numel() else 0.0)
            self._equal += int((steps == 0).sum())
        else:
            self._equal += int(((ours == theirs) | (ours.isnan() & theirs.isnan())).sum())
        self._values += ours.numel()
        if ours.is_floating_point() and ours.dim() > 1 and ours.shape[-1] > 1:
            agreed = predictions(ours) == predictions(theirs)
            self._predicted, self._agreed = self._predicted + agreed.numel(), self._agreed + int(agreed.sum())

    def figures(self) -> dict[str, Any]:
        return {
            "output": self._layer.name,
            "values": self._values,
            "identical": self._equal / max(self._values, 1),
            "largest": self._largest if self._grid is not None else float("nan"),
            "top_1": self._agreed / self._predicted if self._predicted else float("nan"),
        }


def _sizes(file: Path) -> tuple[Any, ...]:
    beside = _float_file(file)
    kib = [None if path is None else _bytes(path) / 1024 for path in (beside, file)]
    return ("file [KiB]", kib[0], None, kib[1])


def _bytes(file: Path) -> int:
    data = file.with_name(f"{file.name}.data")  # where tensors lie beside a large model
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _float_file(file: Path) -> Path | None:
    beside = file.with_name(f"{file.name.removesuffix('.onnx')}.float.onnx")
    return beside if beside.exists() else None


def _latencies(
    sim: QuantSim, target: Target, file: Path, flat: list[Any], optimised: bool, threads: int
) -> tuple[Any, ...]:
    """Median milliseconds of one batch, taken in turns; the first run of each, which prepares, is not counted."""
    beside = _float_file(file)
    targets = {"on_target": target}
    if beside is not None:
        targets["float"] = Target(sim, beside, optimised, threads)
    feeds = {name: each.feeds(flat) for name, each in targets.items()}
    times: dict[str, list[float]] = {name: [] for name in targets}
    begun = time.perf_counter()
    for number in range(_LATENCY_ROUNDS + 1):
        for name, each in targets.items():
            start = time.perf_counter()
            each.session.run(None, feeds[name])
            if number:
                times[name].append(time.perf_counter() - start)
        if number and time.perf_counter() - begun > _LATENCY_S:
            break
    ms = {name: 1e3 * sorted(found)[len(found) // 2] for name, found in times.items()}
    return ("latency [ms a batch]", ms.get("float"), None, ms["on_target"])


def _scores(sim: QuantSim, target: Target, evaluation: Evaluation) -> tuple[Any, ...]:
    return (
        evaluation.name,
        sim.evaluate(evaluation, quantized=False),
        sim.evaluate(evaluation),
        score_of(sim, target, evaluation),
    )


def score_of(sim: QuantSim, target: Target, evaluation: Evaluation) -> Measurement:
    """The score of what the target computes."""
    if isinstance(evaluation, Score):
        value = evaluation.function(target)
        return value if isinstance(value, Measurement) else Measurement(float(value))
    assert evaluation.batches is not None
    return evaluation.of_outputs(sim, (target.of(sim.inputs(batch)) for batch in evaluation.batches))


def _notes(sim: QuantSim, file: Path, optimised: bool) -> list[str]:
    notes = []
    compared = compare_encodings(sim, file)
    changed = compared[compared["state"] == DIFFERS]
    if len(changed):
        notes.append(
            f"{len(changed)} grids of the file are not the sim's, the first is that of {changed['tensor'].iloc[0]!r}: "
            "the sim changed since it was exported. Export it again."
        )
    if optimised and not sim.preset.int32_bias:
        notes.append(
            "The sim computes in float, the target in integers: presets.onnxruntime() simulates its kernels, and "
            "on_target(..., optimised=False) runs the file in float."
        )
    if not optimised and sim.preset.int32_bias:
        notes.append(
            "The sim computes as integer kernels do; with its optimisations off, the runtime computes in float. "
            "presets.w8a8() simulates that."
        )
    return notes


def _table(frame: pd.DataFrame) -> str:
    frame = _readable(frame)
    head = "".join(f'<th scope="col">{html.escape(str(name).replace("_", " "))}</th>' for name in frame.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(frame: pd.DataFrame) -> str:
    return _readable(frame).to_string(index=False)


def _readable(frame: pd.DataFrame) -> pd.DataFrame:
    """All cells as texts, shares as percentages."""
    shares = {name: frame[name].map("{:.2%}".format).replace("nan%", None) for name in _SHARES & {*frame.columns}}
    return frame.assign(**shares).map(_cell)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and not isinstance(value, Measurement) else str(value)
