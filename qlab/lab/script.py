"""The script of a lab: how its sim began, then every action that was not undone."""

import os
from collections.abc import Mapping, Sequence

from qlab.lab.code import Code, preset_code
from qlab.lab.journal import Action, action_of, edits_between
from qlab.sim import QuantSim
from qlab.sim.log import LogEntry, Marks


def beginning_of(sim: QuantSim, known: Mapping[str, object]) -> Code:
    """How to get to `sim` as it is, from its log; `known` are names that data and score have in the script."""
    parts = [_first(sim, sim.log[0])]
    previous = sim.log[0].after
    for entry in sim.log[1:]:
        parts += [action.code() for action in edits_between(sim, previous, entry.before)]
        parts.append(action_of(entry, known).code())
        previous = entry.after
    parts += [action.code() for action in edits_between(sim, previous, Marks.of(sim))]
    return Code.joined(parts)


def script_of(beginning: Code, actions: Sequence[Action]) -> str:
    """The whole script."""
    whole = Code.joined([beginning, *(action.code() for action in actions)])
    return "\n".join(sorted(whole.imports, key=lambda line: line.startswith("from "))) + "\n\n" + whole.text


def _first(sim: QuantSim, entry: LogEntry) -> Code:
    axes = () if sim.graph.runs_whole else _dynamic(sim)
    dynamic = f", dynamic={axes}" if axes else ""
    if entry.what == "load":
        return Code.line(f"sim = qlab.load({os.fspath(entry.batches)!r}, model, example{dynamic})", ("import qlab",))
    preset = preset_code(sim.preset)
    imports = ("import qlab", *preset.imports)
    failing = ', on_capture_failure="modules"' if sim.graph.runs_whole else ""
    return Code.line(f"sim = qlab.QuantSim(model, example, {preset.text}{dynamic}{failing})", imports)


def _dynamic(sim: QuantSim) -> tuple[int, ...]:
    """The axes beside the batch whose size may change."""
    shapes = [layer.shape for layer in sim.graph.input_layers if layer.shape is not None]
    return tuple(sorted({axis for shape in shapes for axis, size in enumerate(shape) if size is None and axis > 0}))
