"""Values as Python: settings, techniques and presets written so that running the text gives them back."""

import ast
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import qlab
from qlab.quantization import Granularity, QuantSpec, RangeRule, Scheme
from qlab.sim import Preset, presets
from qlab.techniques import Technique


@dataclass(frozen=True)
class Code:
    """Lines of Python with the imports that they need.

    problem: why the text does not give the value back, '' where it does.
    """

    text: str
    imports: tuple[str, ...] = ()
    problem: str = ""

    @classmethod
    def line(cls, text: str, imports: tuple[str, ...] = ()) -> "Code":
        """One line."""
        return cls(text + "\n", imports)

    @classmethod
    def missing(cls, text: str, what: str) -> "Code":
        """A place where the person has to write something: the script says so and stops there."""
        told = " ".join(f"{what}: {text}".split())
        return cls(
            f"# {told}\nraise NotImplementedError({f'put the step here that the script cannot write: {told}'!r})\n"
        )

    @classmethod
    def joined(cls, parts: Iterable["Code"]) -> "Code":
        """All parts, one after the other."""
        all_parts = list(parts)
        imports = dict.fromkeys(line for part in all_parts for line in part.imports)
        return cls("".join(part.text for part in all_parts), tuple(imports))


def literal(value: object) -> str:
    """The Python for a setting; a Scheme, Granularity or RangeRule becomes its name.

    >>> literal(RangeRule.of("percentile(99.99925)"))
    "'percentile(99.99925)'"
    """
    return repr(plain(value))


def plain(value: object) -> object:
    """A setting as numbers, strings, tuples and dicts, which compare and print alike everywhere."""
    if isinstance(value, Scheme):
        return value.value
    if isinstance(value, Granularity):
        return str(value)
    if isinstance(value, RangeRule):
        shown = str(value)
        return shown if RangeRule.of(shown) == value else f"{value.name}({value.parameter!r})"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(plain(item) for item in value)
    return value


def call_of(function: str, arguments: Sequence[object], keywords: Mapping[str, object]) -> str:
    """A call, on one line.

    >>> call_of("sim.configure", ("fc",), {"weight": {"bits": 4}})
    "sim.configure('fc', weight={'bits': 4})"
    """
    told = [literal(value) for value in arguments] + [f"{key}={literal(value)}" for key, value in keywords.items()]
    return f"{function}({', '.join(told)})"


def technique_code(technique: Technique) -> Code:
    """The technique with the settings that are not the defaults."""
    return _value(technique)


def preset_code(preset: Preset) -> Code:
    """The call that makes the preset, or the Preset spelled out where none of the presets' functions gives it."""
    for make, per_channel, symmetric in product(
        (presets.w8a8, presets.w4a8, presets.w8a16, presets.w4a4), (False, True), (None, True, False)
    ):
        rule = str(plain(preset.output.rule))
        keywords = {"per_channel": per_channel, "symmetric": symmetric, "skip": preset.skip, "rule": rule}
        keywords["int32_bias"] = preset.int32_bias
        if make(**keywords) == preset:  # type: ignore[arg-type]
            told = {key: value for key, value in keywords.items() if value != _default(make, key)}
            return Code(call_of(f"qlab.presets.{make.__name__}", (), told))
    return _value(preset)


def _default(function: Any, name: str) -> object:
    import inspect

    return inspect.signature(function).parameters[name].default


def _value(value: object) -> Code:
    """Any value as Python, its problem told where that is not possible."""
    value = plain(value)
    if isinstance(value, QuantSpec) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return _instance(value)
    if isinstance(value, (tuple, list)):
        parts = [_value(item) for item in value]
        inside = ", ".join(part.text for part in parts)
        text = f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(parts) == 1 else ''})"
        problems = [part.problem for part in parts if part.problem]
        return Code(text, Code.joined(parts).imports, problems[0] if problems else "")
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    return Code(text) if same else Code("...", problem=f"{type(value).__name__} has no Python text")


def _instance(value: Any) -> Code:
    cls, imports = type(value), []
    name = cls.__name__
    if getattr(qlab, name, None) is cls:
        name = f"qlab.{name}"
    elif cls.__module__ != "__main__":
        imports.append(f"from {cls.__module__} import {name}")
    told, problem = [], ""
    known = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    if not known:
        problem = f"{cls.__qualname__} is not at the top level of a module"
    for spec in dataclasses.fields(value):
        given = getattr(value, spec.name)
        default = spec.default if spec.default is not dataclasses.MISSING else dataclasses.MISSING
        if default is dataclasses.MISSING and spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        if not spec.init or _same(given, default):
            continue
        part = _value(given)
        told.append(f"{spec.name}={part.text}")
        imports += part.imports
        if part.problem:
            problem = problem or f"{spec.name} of {cls.__name__}: {part.problem}"
    return Code(f"{name}({', '.join(told)})", tuple(dict.fromkeys(imports)), problem)


def _same(given: object, default: object) -> bool:
    return type(given) is type(default) and bool(given == default)
