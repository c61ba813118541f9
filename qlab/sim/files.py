"""A sim in a file: one safetensors file with weights, encodings, statistics and settings as JSON. No pickle.

The file holds what was changed, not the model's code: `load` needs the model and an example, captures them again and
puts the saved state back. Files are written beside and renamed into place.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.graph import FoldedNorm
from qlab.quantization import Encoding, Quantizer, QuantizerState, QuantSpec, Statistics
from qlab.sim.log import LogEntry, Marks
from qlab.sim.presets import Preset
from qlab.sim.tensor_file import write_tensors

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

FORMAT = "qlab-sim-1"


def save(sim: "QuantSim", path: str | os.PathLike[str]) -> None:
    """Writes `sim` to `path`; an existing file is replaced only when the new one is complete. Raises OSError."""
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, value in _model_tensors(sim.model).items():
        if id(value) in seen:
            aliases[name] = seen[id(value)]
        else:
            seen[id(value)] = name
            tensors[f"model.{name}"] = value
    quantizers = {}
    for name, quantizer in sim.quantizers.items():
        assert isinstance(quantizer, Quantizer)
        quantizers[name] = _describe(quantizer.state(), f"quantizer.{name}", tensors)
    for name, norm in sim.graph.folded.items():
        tensors[f"folded.{name}.mean"] = norm.mean.cpu().contiguous()
        tensors[f"folded.{name}.deviation"] = norm.deviation.cpu().contiguous()
    header = {
        "format": FORMAT,
        "preset": _preset_to_json(sim.preset),
        "quantizers": quantizers,
        "edits": sim.graph.edits,
        "folded": list(sim.graph.folded),
        "aliases": aliases,
        "runs_whole": sim.graph.runs_whole,
        "layers": [layer.name for layer in sim.graph],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, tensors, {"qlab": json.dumps(header)})


def load(path: str | os.PathLike[str], model: nn.Module, example: Any, dynamic: Sequence[int] = ()) -> "QuantSim":
    """The sim that was saved to `path`, built on `model` captured with `example`.

    Raises InputError where the file is not a saved sim or belongs to another model.
    """
    from qlab.sim.quant_sim import QuantSim

    header, tensors = _read(path)
    failing = "modules" if header.get("runs_whole") else "raise"
    sim = QuantSim(model, example, _preset_from_json(header["preset"]), dynamic, failing)
    _put(sim, header, tensors, path)
    marks = Marks.of(sim)
    sim.log[:] = [LogEntry("load", os.fspath(path), None, marks, marks)]
    return sim


def load_state(sim: "QuantSim", path: str | os.PathLike[str]) -> None:
    """Changes `sim` to the state saved at `path`, which was reached from the state that `sim` is in.

    Cheaper than `load`: nothing is captured. Raises InputError as `load` does; then `sim` may be changed in part.
    """
    header, tensors = _read(path)
    _put(sim, header, tensors, path)
    sim.preset = _preset_from_json(header["preset"])


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a saved sim; raises InputError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("qlab", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise InputError(f"{path} is not a sim saved by this version of qlab ({FORMAT}).")
        _preset_from_json(header["preset"])
    except (
        OSError,
        SafetensorError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
        raise InputError(f"{path} is not a readable sim file: {error}.") from error
    return header, tensors


def _put(sim: "QuantSim", header: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Changes `sim` to what was read from `path`."""
    try:
        _put_back(sim, header, tensors, path)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} does not hold what its header says: {error}.") from error


def _put_back(
    sim: "QuantSim", header: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike[str]
) -> None:
    names = [layer.name for layer in sim.graph]
    if names != header["layers"]:
        odd = next((a for a, b in zip(names, header["layers"], strict=False) if a != b), "the number of layers")
        raise InputError(f"{path} was saved from another model: it differs at {odd!r}.")
    for name, kind in header["edits"][len(sim.graph.edits) :]:
        sim.graph.replace_module(name, kind)
    for name in header["folded"]:
        sim.graph.folded[name] = FoldedNorm(tensors[f"folded.{name}.mean"], tensors[f"folded.{name}.deviation"])
    _load_model(sim.model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, quantizer in sim.quantizers.items():
        if name not in header["quantizers"]:
            raise InputError(f"{path} has no quantizer {name!r}: it was saved with another placement.")
        assert isinstance(quantizer, Quantizer)
        quantizer.set_state(_restore(header["quantizers"][name], f"quantizer.{name}", tensors))
    sim.changed()


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _load_model(model: nn.Module, saved: dict[str, Tensor]) -> None:
    present = _model_tensors(model)
    with torch.no_grad():
        for name, value in saved.items():
            if name in present and present[name].shape == value.shape:
                present[name].copy_(value)
                continue
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent).register_parameter(attribute, nn.Parameter(value))


def _describe(state: QuantizerState, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state as JSON; its tensors go into `tensors` under `key`."""
    found: dict[str, Any] = {
        "spec": _spec_to_json(state.spec),
        "enabled": state.enabled,
        "frozen": state.frozen,
        "fitted": state.fitted,
        "by_rounding": list(state.by_rounding),
    }
    if state.encoding is not None:
        encoding = state.encoding
        found["encoding"] = [encoding.qmin, encoding.qmax, encoding.axis, encoding.block_size, encoding.block_axis]
        tensors[f"{key}.scale"] = encoding.scale.cpu().contiguous()
        tensors[f"{key}.zero_point"] = encoding.zero_point.cpu().contiguous()
    if not state.statistics.is_empty:
        found["statistics"] = state.statistics.to_dict(tensors, f"{key}.statistics")
    for name in ("codes", "bias_correction"):
        value = getattr(state, name)
        if value is not None:
            tensors[f"{key}.{name}"] = value.cpu().contiguous()
    return found


def _restore(found: dict[str, Any], key: str, tensors: dict[str, Tensor]) -> QuantizerState:
    encoding = None
    if "encoding" in found:
        encoding = Encoding(tensors[f"{key}.scale"], tensors[f"{key}.zero_point"], *found["encoding"])
    statistics = Statistics()
    if "statistics" in found:
        statistics = Statistics.from_dict(found["statistics"], tensors, f"{key}.statistics")
    return QuantizerState(
        _spec_from_json(found["spec"]),
        found["enabled"],
        found["frozen"],
        encoding,
        statistics,
        found["fitted"],
        tensors.get(f"{key}.codes"),
        tensors.get(f"{key}.bias_correction"),
        by_rounding=tuple(found.get("by_rounding", (False, False))),
    )


def _spec_to_json(spec: QuantSpec) -> dict[str, Any]:
    rule = f"percentile({spec.rule.parameter})" if spec.rule.name == "percentile" else spec.rule.name
    return {
        "bits": spec.bits,
        "scheme": spec.scheme.value,
        "granularity": str(spec.granularity),
        "rule": rule,
        "known_range": spec.known_range,
    }


def _spec_from_json(found: dict[str, Any]) -> QuantSpec:
    return QuantSpec(**{**found, "known_range": tuple(found["known_range"]) if found["known_range"] else None})


def _preset_to_json(preset: Preset) -> dict[str, Any]:
    found = {key: value for key, value in asdict(preset).items() if key not in ("weight", "output", "kinds")}
    found["weight"], found["output"] = _spec_to_json(preset.weight), _spec_to_json(preset.output)
    found["kinds"] = [[k, part, None if spec is None else _spec_to_json(spec)] for k, part, spec in preset.kinds]
    return found


def _preset_from_json(found: dict[str, Any]) -> Preset:
    found = dict(found)
    found["weight"], found["output"] = _spec_from_json(found["weight"]), _spec_from_json(found["output"])
    found["kinds"] = tuple((k, part, None if s is None else _spec_from_json(s)) for k, part, s in found["kinds"])
    found["skip"] = tuple(found["skip"])
    found["supergroups"] = tuple(tuple(group) for group in found["supergroups"])
    return Preset(**found)
