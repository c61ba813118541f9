"""The script of a lab: how its sim began, then every action that was not undone."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlab.lab.code import Code, preset_code
from qlab.lab.journal import Action, Set
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import QuantSim
from qlab.sim.placement import place


@dataclass(frozen=True)
class Beginning:
    """How to get to the sim that the lab was given, as code."""

    code: Code

    @classmethod
    def of(cls, sim: QuantSim) -> "Beginning":
        """The beginning of a sim that was calibrated with the lab's batches, or will be; told where it is not so."""
        preset = preset_code(sim.preset)
        dynamic = _dynamic(sim)
        arguments = ["model", "example", preset.text, *([f"dynamic={dynamic}"] if dynamic else [])]
        parts = [Code.line(f"sim = qlab.QuantSim({', '.join(arguments)})", ("import qlab", *preset.imports))]
        if problem := _foreign(sim):
            parts.append(Code.missing("the sim was not new when the lab began", problem))
        parts += [edit.code() for edit in _settings(sim)]
        return cls(Code.joined([*parts, Code.line("sim.calibrate(batches)")]))


def script_of(beginning: Beginning, actions: Sequence[Action]) -> str:
    """The whole script."""
    whole = Code.joined([beginning.code, *(action.code() for action in actions)])
    return "\n".join(sorted(whole.imports, key=lambda line: line.startswith("from "))) + "\n\n" + whole.text


def _dynamic(sim: QuantSim) -> tuple[int, ...]:
    """The axes beside the batch whose size may change."""
    shapes = [layer.shape for layer in sim.graph.input_layers if layer.shape is not None]
    return tuple(sorted({axis for shape in shapes for axis, size in enumerate(shape) if size is None and axis > 0}))


def _settings(sim: QuantSim) -> list[Set]:
    """Settings that differ from what the preset places."""
    found = []
    for name, placed in place(sim.graph, sim.preset).items():
        for part in ("weight", "output"):
            fresh, given = getattr(placed, part), getattr(sim.placed[name], part)
            if fresh is None or given is None or given.name != name:
                continue
            changed = {
                key: getattr(given, key) for key in ("bits", "scheme", "granularity", "rule", "enabled", "frozen")
            }
            changed = {key: value for key, value in changed.items() if value != getattr(fresh, key)}
            if changed:
                found.append(Set((name,), part, changed))
    return found


def _foreign(sim: QuantSim) -> str:
    """What was done to the sim before that no setting tells, '' where nothing was."""
    if sim.graph.edits:
        return "modules of its graph were replaced"
    quantizers = [q for q in sim.quantizers.values() if isinstance(q, Quantizer)]
    if any(
        isinstance(q, WeightQuantizer) and (q.rounding is not None or q.bias_correction is not None) for q in quantizers
    ):
        return "a technique had chosen roundings or corrected biases"
    if any(q.frozen for q in quantizers):
        return "encodings were frozen by hand"
    return ""
