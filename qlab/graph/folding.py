"""Which layer can take a BatchNorm: the kernel before it, the kernel after it, or none, with the reason.

BatchNorm folding asks before it folds; validation asks to say what will not be folded.
"""

import torch

from qlab.graph.batch_norm import BatchNorm
from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.layer_graph import Layer, LayerGraph
from qlab.graph.patterns import Path, Uses, follow


@torch.no_grad()
def fold_in_float(graph: LayerGraph) -> None:
    """Changes the graph: every BatchNorm that can be folded is, in float; for who asks what folding will leave."""
    for norm in [norm for layer in graph if (norm := BatchNorm.of(layer)) is not None]:
        if folding_obstacle(graph, norm):
            continue
        uses = Uses(graph)
        before, after = kernel_before(uses, norm), kernel_after(uses, norm)
        if not isinstance(before, str):
            kernel, _ = before
            old = torch.zeros_like(norm.shift) if kernel.bias is None else kernel.bias.detach().double()
            kernel.shift_bias(old * (norm.factor - 1) + norm.shift)
            kernel.weight.mul_(kernel.factors(outputs=norm.factor).to(kernel.weight))
        elif not isinstance(after, str):
            kernel = after.second
            kernel.shift_bias(kernel.response(norm.shift.repeat_interleave(after.repeat)))
            factor = norm.factor.repeat_interleave(after.repeat)
            kernel.weight.mul_(kernel.factors(inputs=factor).to(kernel.weight))
        else:
            continue
        graph.replace_module(norm.layer.name, "identity")


def why_not_folded(graph: LayerGraph, uses: Uses, norm: BatchNorm) -> str:
    """Why BatchNorm folding will leave the norm as it is; '' where it can be folded."""
    if reason := folding_obstacle(graph, norm):
        return reason
    before = kernel_before(uses, norm)
    if not isinstance(before, str):
        return ""
    after = kernel_after(uses, norm)
    return f"{before}; {after}" if isinstance(after, str) else ""


def folding_obstacle(graph: LayerGraph, norm: BatchNorm) -> str:
    """Why the norm is no constant factor and shift of its own; '' where it is."""
    if not norm.has_statistics:
        return "it keeps no running statistics and normalises by the batch"
    module = norm.layer.module
    if module is not None and module.training:
        return "it is in training mode and normalises by the batch: run sim.eval() first"
    if module is not None and (calls := sum(layer.module is module for layer in graph)) > 1:
        return f"it is called {calls} times"
    return ""


def kernel_before(uses: Uses, norm: BatchNorm) -> tuple[Kernel, list[Layer]] | str:
    """The kernel that alone feeds the norm and the identities between; or why there is none that could take it."""
    source = norm.layer.args[0]
    passed: list[Layer] = []
    while True:
        if isinstance(reason := uses.only_user(source), str):
            return reason
        if source.kind != "identity":
            break
        passed.append(source)
        source = source.args[0]
    kernel = kernel_of(source)
    if kernel is None:
        return f"{source.name!r} ({source.title}) stands before it"
    if reason := uses.sharing(kernel):
        return reason
    if kernel.channel_axis != 1:
        return f"{kernel.name!r} has its channels on another axis"
    return (kernel, passed) if kernel.can_take_bias else f"{kernel.name!r} is a function without a bias"


def kernel_after(uses: Uses, norm: BatchNorm) -> Path | str:
    """The path to the kernel that alone takes the norm's channels; or why none can take it exactly."""
    path = follow(uses, norm.layer, axis=1)
    if isinstance(path, str):
        return path
    for layer in path.between:
        if layer.kind not in ("identity", "reshape", "transpose"):
            return f"{layer.name!r} ({layer.title}) follows"
    if not path.second.can_take_bias:
        return f"{path.second.name!r} is a function without a bias"
    if path.second.pads_with_zeros and bool((norm.shift != 0).any()):
        return f"{path.second.name!r} pads with zeros, which the shift would miss"
    return path
