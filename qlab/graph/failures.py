"""What keeps a model from being captured: every place at once, by torch.export.draft_export, and not the first alone.

draft_export goes on where export stops: it follows the branch that the example takes, and lists each place where it had
to. Code that it cannot run at all (NumPy, unsupported Python) ends it, so of those only the first is known.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._logging.structured import INTERN_TABLE

from qlab.errors import CaptureError
from qlab.graph.admission import admitted, readable_forward, register_results, result_of, without_fused_attention
from qlab.graph.example import at_least_two, example_arguments, on_device_of
from qlab.graph.findings import Note, Rules, Severity
from qlab.graph.tracing import cause_of, dynamic_shapes, is_users, place_of, quiet_logs

rules = Rules()

_BRANCH = "the path depends on the value of a tensor"


@dataclass(frozen=True)
class Failure:
    """One thing that keeps a model from being captured.

    kind: 'model', 'example' or 'forward' before export is tried; 'branch', 'size', 'operator' or 'other' for places
    that export cannot follow; 'random' where the captured graph computes something else. told: the cause in words.
    """

    kind: str
    told: str
    location: str = ""
    code: str = ""


def export_failures(model: nn.Module, example: Any, dynamic: Sequence[int], error: CaptureError) -> list[Failure]:
    """The places that keep `model` from being captured; `error` is what capture said, used where there is no place."""
    if isinstance(error.__cause__, SyntaxError):  # of the code that export writes, not of the user's
        return [Failure("other", _first_line(error))]
    own = admitted(model)
    args, kwargs = example_arguments(own, example)
    args, kwargs = at_least_two(*on_device_of(own, (args, kwargs)))
    result = result_of(own, args, kwargs)
    register_results(result)
    shapes = dynamic_shapes(own, args, kwargs, dynamic)
    try:
        with warnings.catch_warnings(), torch.no_grad(), without_fused_attention(), quiet_logs():
            warnings.simplefilter("ignore")
            with readable_forward(own, kwargs, result):
                program = torch.export.draft_export(own, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as stopped:  # noqa: BLE001  what stopped it is what the person is shown
        reasons = [error.__cause__, stopped] if error.__cause__ is not None else [stopped]
        failures = {place_of(reason)[0]: _failure(reason) for reason in reversed(reasons)}
        return list(reversed(failures.values()))
    found = list(dict.fromkeys(_reported(program._report)))
    if not found and error.__cause__ is None:  # the graph is there, but computes something else
        return [Failure("random", _first_line(error))]
    return found or [_failure(error.__cause__ or error)]


@rules.rule(
    "QL101",
    Severity.ERROR,
    "The model cannot be taken",
    "qlab reads a module's Python code and quantizes its weights: both must be there.",
    "Pass the eager nn.Module, initialised and with its weights loaded.",
)
def unfit_model(failures: list[Failure]) -> Iterator[Note]:
    """No module, TorchScript, lazy modules without shapes, weights on the meta device or in pieces."""
    return _of(failures, "model")


@rules.rule(
    "QL102",
    Severity.ERROR,
    "The example cannot be taken",
    "Capture runs the model once on the example; its axes tell which sizes are fixed and which are free.",
    "Pass one batch as the model takes it: a tensor, a tuple, a dict, or the first batch of a loader.",
)
def unfit_example(failures: list[Failure]) -> Iterator[Note]:
    """No tensor in it, no sample, or no data."""
    return _of(failures, "example")


@rules.rule(
    "QL103",
    Severity.ERROR,
    "Forward raises on the example",
    "A model that does not run cannot be quantized.",
    "Run model(example) yourself: the error is the model's own. Check the example's shapes, types and order.",
)
def forward_raises(failures: list[Failure]) -> Iterator[Note]:
    """The model's own error, with the user's file and line."""
    return _of(failures, "forward")


@rules.rule(
    "QL104",
    Severity.ERROR,
    "Code branches on the values of a tensor",
    "A graph has one path for all data. A branch on values takes another path for other data, which no target can run "
    "and no simulation can see.",
    "Compute both sides and choose with torch.where, use torch.cond, or move the branch out of forward.",
)
def branches_on_data(failures: list[Failure]) -> Iterator[Note]:
    """A Python `if`, `while`, int() or bool() on a tensor."""
    return _of(failures, "branch")


@rules.rule(
    "QL105",
    Severity.ERROR,
    "Code fixes a size that must stay free",
    "Calibration, evaluation and the target use batches of other sizes than the example.",
    "Use x.shape[0] and -1 in view and reshape instead of numbers. Where the batch is another axis, name it: "
    "dynamic=(1,).",
)
def fixes_a_size(failures: list[Failure]) -> Iterator[Note]:
    """The batch size, or an axis of `dynamic`, written as a number."""
    return _of(failures, "size")


@rules.rule(
    "QL106",
    Severity.ERROR,
    "An operator cannot be traced",
    "An operator without a fake kernel cannot say which shape it returns, so that nothing after it can be captured.",
    "Register one with torch.library.register_fake, or replace the operator.",
)
def untraceable_operator(failures: list[Failure]) -> Iterator[Note]:
    """A custom operator without a meta implementation, or with one that disagrees."""
    return _of(failures, "operator")


@rules.rule(
    "QL107",
    Severity.ERROR,
    "Code cannot be captured",
    "What torch.export cannot follow has no place in a graph: it can be neither quantized nor exported.",
    "Use tensor operations in forward: no NumPy, no .tolist(), no printing of values, no containers filled on the way. "
    'Until then QuantSim(model, example, on_capture_failure="modules") quantizes module by module.',
)
def untraceable_code(failures: list[Failure]) -> Iterator[Note]:
    """Python that is no tensor operation; tracing ends there, so places after it are not known."""
    return _of(failures, "other")


@rules.rule(
    "QL108",
    Severity.ERROR,
    "The result is not a function of the inputs",
    "Random numbers in eval mode, or state kept between calls, make a comparison of float and quantized meaningless.",
    "Draw random numbers in training only (if self.training), or pass them in; keep state out of forward.",
)
def random_result(failures: list[Failure]) -> Iterator[Note]:
    """The captured graph gives another result than the model."""
    return _of(failures, "random")


def _of(failures: list[Failure], kind: str) -> Iterator[Note]:
    for failure in failures:
        if failure.kind == kind:
            yield Note(": ".join(filter(None, (failure.told, failure.code))), location=failure.location)


def _reported(report: Any) -> Iterator[Failure]:
    """The failures of a draft export, each with the user's innermost frame."""
    for failure in report.failures:
        name, data = failure.failure_type.name, failure.data
        location, code = _frame(data)
        if name == "DATA_DEPENDENT_ERROR":
            yield Failure("branch", _BRANCH, location, code)
        elif name in ("MISSING_FAKE_KERNEL", "MISMATCHED_FAKE_KERNEL"):
            reason = data.get("reason") or "it has no fake kernel"
            yield Failure("operator", f"operator {data.get('op', '')}: {reason}", location, code)
        elif name == "GUARD_ADDED" and data.get("prefix") == "eval" and str(data["expr"]).startswith("Eq("):
            yield Failure("size", _in_words(str(data["expr"]), data), location, code)
        elif name == "CONSTRAINT_VIOLATION_ERROR":
            yield Failure("size", "a declared size does not hold", location, code)


def _failure(error: BaseException) -> Failure:
    """What an exception of export says."""
    location, code = place_of(error)
    kind = cause_of(error)
    return Failure(
        kind, _BRANCH if kind == "branch" else f"{type(error).__name__}: {_first_line(error)}", location, code
    )


def _frame(data: dict[str, Any]) -> tuple[str, str]:
    """('file:line', the code there) of the user's innermost frame behind a failure."""
    names = {number: name for name, number in INTERN_TABLE.items()}  # the report's own table lacks what was seen before
    for frame in reversed([*(data.get("stack") or ()), *(data.get("user_stack") or ())]):
        file = str(names.get(frame["filename"], frame["filename"]))
        if is_users(file):
            return f"{file}:{frame['line']}", str(frame.get("loc") or "").strip()
    return "", ""


def _in_words(expression: str, data: dict[str, Any]) -> str:
    """'Eq(s77, 4)' with the axis that s77 stands for."""
    for symbol, source in (data.get("symbol_to_sources") or {}).items():
        match = re.search(r"L\['(\w+)'\].*size\(\)\[(\d+)\]", str(source))
        if match:
            expression = re.sub(rf"\b{symbol}\b", f"axis {match[2]} of {match[1]!r}", expression)
    if match := re.fullmatch(r"Eq\(Mod\((.+), (\d+)\), 0\)", expression):
        return f"{match[1]} must be a multiple of {match[2]}"
    match = re.fullmatch(r"Eq\((.+), (\d+)\)", expression)
    return f"{match[1]} must be {match[2]}" if match else expression


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
