"""A configuration file of AIMET's QuantSim as a preset: which operators and parameters of a target are quantized, how.

Sections: defaults (of operators, of parameters, symmetry), params (by parameter name), op_type (by ONNX operator),
supergroups, model_input and model_output. Truth values may be written as texts.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from qlab.errors import InputError
from qlab.graph.onnx_kinds import kinds_of
from qlab.quantization import PER_CHANNEL, PER_TENSOR, QuantSpec, Scheme
from qlab.sim.presets import Preset

MAX_BYTES = 1 << 24
_SECTIONS = {"defaults", "params", "op_type", "supergroups", "supergroup_pass_list", "model_input", "model_output"}
_FLAGS = {"strict_symmetric", "unsigned_symmetric", "per_channel_quantization"}


def preset_of_config(
    path: str | os.PathLike[str], output_bits: int = 8, weight_bits: int = 8, rule: str = "min_max"
) -> Preset:
    """See `presets.from_aimet`."""
    config = _read(path)
    try:
        return _preset(config, Path(path).stem, output_bits, weight_bits, rule)
    except InputError as error:
        raise InputError(f"{path} is not a usable AIMET configuration: {error}") from error


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES:,} bytes; that is no AIMET configuration.")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold an object; it holds {type(found).__name__}.")
    return found


def _preset(config: dict[str, Any], name: str, output_bits: int, weight_bits: int, rule: str) -> Preset:
    notes = _unknown(config, _SECTIONS, "the file")
    defaults = _section(config, "defaults")
    notes += _unknown(defaults, {"ops", "params", "hw_version", *_FLAGS}, "defaults")
    parameters = _section(defaults, "params") | _section(_section(config, "params"), "weight")
    operators, bias = _section(defaults, "ops"), _section(_section(config, "params"), "bias")
    strict, unsigned = (_truth(defaults, flag, False) for flag in ("strict_symmetric", "unsigned_symmetric"))
    if strict and unsigned:
        notes.append("unsigned_symmetric beside strict_symmetric")
    whole = Scheme.STRICT_SYMMETRIC if strict else Scheme.UNSIGNED_SYMMETRIC if unsigned else Scheme.SYMMETRIC
    output = QuantSpec(
        output_bits,
        whole if _truth(operators, "is_symmetric", False) else Scheme.ASYMMETRIC,
        rule=rule,  # type: ignore[arg-type]
    )
    weight = QuantSpec(
        weight_bits,
        whole if _truth(parameters, "is_symmetric", False) else Scheme.ASYMMETRIC,
        PER_CHANNEL if _truth(defaults, "per_channel_quantization", False) else PER_TENSOR,
    )
    on = _truth(operators, "is_output_quantized", False), _truth(parameters, "is_quantized", False)
    inputs = _truth(_section(config, "model_input"), "is_input_quantized", False)
    kinds: list[tuple[str, str, QuantSpec | None]] = [("input", "output", output)] if inputs and not on[0] else []
    for operator, settings in _section(config, "op_type").items():
        kinds += _of_operator(operator, settings, output, weight, on, whole, notes)
    kinds += [("*", part, None) for part, enabled in zip(("output", "weight"), on, strict=True) if not enabled]
    if passes := config.get("supergroup_pass_list"):
        notes.append(f"supergroup_pass_list {passes}: a linear layer with its bias is one step here in any case")
    return Preset(
        name,
        weight,
        output,
        supergroups=tuple(_supergroups(config)),
        kinds=tuple(kinds),
        quantize_inputs=inputs,
        quantize_outputs=_truth(_section(config, "model_output"), "is_output_quantized", True),
        int32_bias=_truth(bias, "is_quantized", on[1]),
        advice=f"Not taken over: {'; '.join(notes)}." if notes else "",
    )


def _of_operator(
    operator: str,
    settings: Any,
    output: QuantSpec,
    weight: QuantSpec,
    on: tuple[bool, bool],
    whole: Scheme,
    notes: list[str],
) -> list[tuple[str, str, QuantSpec | None]]:
    """The overrides that one operator's section asks for."""
    if not isinstance(settings, Mapping):
        raise InputError(f"op_type.{operator} must be an object; got {type(settings).__name__}.")
    known = {"is_output_quantized", "is_symmetric", "params", "per_channel_quantization", "encoding_constraints"}
    notes += _unknown(settings, known, f"op_type.{operator}")
    parameters = _section(_section(settings, "params"), "weight")
    if "is_symmetric" in settings:
        output = replace(output, scheme=whole if _truth(settings, "is_symmetric", False) else Scheme.ASYMMETRIC)
    if "encoding_constraints" in settings:
        limits = _section(settings, "encoding_constraints")
        output = replace(output, known_range=(_number(limits, "min"), _number(limits, "max")))
    if "is_symmetric" in parameters:
        weight = replace(weight, scheme=whole if _truth(parameters, "is_symmetric", False) else Scheme.ASYMMETRIC)
    if "per_channel_quantization" in settings:
        by_channel = _truth(settings, "per_channel_quantization", False)
        weight = replace(weight, granularity=PER_CHANNEL if by_channel else PER_TENSOR)
    asked = {
        "output": output if _truth(settings, "is_output_quantized", on[0]) else None,
        "weight": weight if _truth(parameters, "is_quantized", on[1]) else None,
    }
    return [(kind, part, spec) for kind in kinds_of(operator) for part, spec in asked.items()]


def _supergroups(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The sequences of kinds. 'Conv' is an ordinary convolution here: aimet-torch 2.42 does not fuse depthwise ones."""
    groups = config.get("supergroups", [])
    if not isinstance(groups, list):
        raise InputError(f"supergroups must be a list; got {type(groups).__name__}.")
    found: list[tuple[str, ...]] = []
    for group in groups:
        operators = group.get("op_list") if isinstance(group, Mapping) else None
        if not isinstance(operators, list) or not all(isinstance(operator, str) for operator in operators):
            raise InputError(f"each of supergroups must have an op_list of operator names; got {group!r:.80}.")
        kinds = [("conv",) if operator == "Conv" else kinds_of(operator) for operator in operators]
        found += product(*kinds)
    return found


def _section(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = parent.get(key, {})
    if not isinstance(found, dict):
        raise InputError(f"{key!r} must be an object; got {type(found).__name__}.")
    return found


def _truth(section: Mapping[str, Any], key: str, default: bool) -> bool:
    value = section.get(key, default)
    if isinstance(value, bool):
        return value
    if value in ("True", "False", "true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"{key!r} must be true or false; got {value!r:.80}.")


def _number(section: Mapping[str, Any], key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{key!r} of encoding_constraints must be a number; got {value!r:.80}.")
    return float(value)


def _unknown(section: Mapping[str, Any], known: set[str], where: str) -> list[str]:
    return [f"{key!r} of {where}" for key in section if key not in known]
