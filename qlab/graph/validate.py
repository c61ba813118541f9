"""What can be said of a model before anything is quantized: whether it can be captured, and how it is written.

`check_model` goes as far as the model lets it and applies the rules of that stage: what keeps it from being captured
(failures.py), the model and one run of it (model_rules.py), the captured graph (graph_rules.py). Rules that need a
preset and placement are in qlab/sim/validate.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qlab.errors import CaptureError
from qlab.graph.admission import admitted, register_results, result_of, unwrapped
from qlab.graph.capture import capture
from qlab.graph.example import check_example, example_arguments, on_device_of
from qlab.graph.failures import Failure, export_failures
from qlab.graph.failures import rules as failure_rules
from qlab.graph.findings import Finding, Severity
from qlab.graph.graph_rules import Captured
from qlab.graph.graph_rules import rules as graph_rules
from qlab.graph.layer_graph import LayerGraph
from qlab.graph.model_rules import Subject
from qlab.graph.model_rules import rules as model_rules
from qlab.graph.observed import observe
from qlab.graph.tracing import place_of


def check_model(model: nn.Module, example: Any, dynamic: Sequence[int] = ()) -> tuple[list[Finding], Captured | None]:
    """What stands in the way of capture and how the model is written; the captured graph where there is one."""
    try:
        own = admitted(model)
    except CaptureError as error:
        return failure_rules.apply([Failure("model", str(error))]), None
    try:
        args, kwargs = example_arguments(own, example)
        check_example(args, kwargs)
    except CaptureError as error:
        return failure_rules.apply([Failure("example", str(error))]), None
    moved = on_device_of(own, (args, kwargs))
    try:
        result = result_of(own, *moved)
    except Exception as error:  # noqa: BLE001  the model's own error is what the person is shown
        return failure_rules.apply([Failure("forward", f"{type(error).__name__}: {error}", *place_of(error))]), None
    register_results(result)
    subject = Subject(model, unwrapped(model), args, kwargs, result, observe(own, *moved))
    findings = model_rules.apply(subject)
    if any(finding.severity is Severity.ERROR and finding.code == "QL111" for finding in findings):
        return _located(findings, subject, None), None
    try:
        graph = capture(model, example, dynamic)
    except CaptureError as error:
        found = findings + failure_rules.apply(export_failures(model, example, dynamic, error))
        return _located(found, subject, None), None
    captured = Captured.of(graph, *moved)
    return _located(findings + graph_rules.apply(captured), subject, graph), captured


def _located(findings: list[Finding], subject: Subject, graph: LayerGraph | None) -> list[Finding]:
    """The findings with the user's file and line: where the layer is called, or else where forward is written."""
    found = []
    for finding in findings:
        if not finding.location:
            layers = [] if graph is None or finding.layer is None else list(graph)
            called = [layer for layer in layers if f"{layer.name}.".startswith(f"{finding.layer}.")]
            place = next((layer.location for layer in called if layer.location), subject.forward)
            finding = replace(finding, location=place)
        found.append(finding)
    return found
