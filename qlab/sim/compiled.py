"""A sim at one moment as straight code that torch.compile turns into kernels of its own: inference only.

Weights are quantized once, grids become numbers, and every layer is one call in a torch.fx graph; nothing of the
interpretation is left. Later changes of the sim are not seen: compile it again.
"""

import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from qlab.errors import InputError
from qlab.graph import Layer, call_layer
from qlab.quantization import Encoding
from qlab.sim.placement import Role

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

_COMPILERS = ("c++", "g++", "clang++")


def compiled(sim: "QuantSim") -> "CompiledSim":
    """See QuantSim.compile."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else _COMPILERS
    if sim.device.type == "cpu" and not any(map(shutil.which, names)):
        raise InputError(
            f"sim.compile() needs a C++ compiler, which torch.compile calls; none of {', '.join(names)} is on PATH. "
            "Install one (g++ will do) or set CXX to it; without one the sim works as it is."
        )
    if sim.preset.int32_bias:
        raise InputError(
            "sim.compile() cannot compute int32 biases as an integer kernel does. Use a preset with int32_bias=False."
        )
    return CompiledSim(sim)


class CompiledSim(nn.Module):
    """What QuantSim.compile returns: called as the sim is, without gradient. The first call compiles, for seconds."""

    def __init__(self, sim: "QuantSim") -> None:
        super().__init__()
        twin = deepcopy(sim).eval()
        self._graph = twin.graph
        self.steps = _straight(twin)
        self._run: Callable[..., Any] = torch.compile(self.steps)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sim's result."""
        flat = self._graph.bind(args, kwargs)
        tensors = [v for layer, v in zip(self._graph.input_layers, flat, strict=True) if layer.shape is not None]
        values: list[Any] = [None] * len(self._graph)
        for index, value in zip(self.steps.results, self._run(*tensors), strict=True):
            values[index] = value
        return self._graph.result(values)


class _Straight(fx.GraphModule):
    """results: the index of the layer that each result comes from."""

    results: list[int]


def _straight(sim: "QuantSim") -> _Straight:
    graph, root = fx.Graph(), nn.Module()
    nodes: dict[int, Any] = {}
    for layer in sim.graph:
        if layer.kind == "input" and layer.shape is None:
            nodes[layer.index] = layer.constant
            continue
        step = _Step(sim, layer)
        root.add_module(f"step{layer.index}", step)
        if layer.kind == "input":
            given: tuple[Any, ...] = (graph.placeholder(f"input{layer.index}"),)
            kwargs: dict[str, Any] = {}
        else:
            given, kwargs = _with_nodes(layer.args, nodes), _with_nodes(layer.kwargs, nodes)
        nodes[layer.index] = graph.call_module(f"step{layer.index}", given, kwargs)
    results = [output.index for output in sim.graph.outputs if isinstance(output, Layer)]
    graph.output(tuple(nodes[index] for index in results))
    module = _Straight(root, graph)
    module.results = results
    return module


def _with_nodes(template: Any, nodes: dict[int, Any]) -> Any:
    if isinstance(template, Layer):
        return nodes[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)(_with_nodes(item, nodes) for item in template)
    if isinstance(template, dict):
        return {key: _with_nodes(item, nodes) for key, item in template.items()}
    return template


class _Step(nn.Module):
    """One layer: its computation with the weight as it is quantized, then rounding to the output's grid."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, sim: "QuantSim", layer: Layer) -> None:
        super().__init__()
        entry, on = sim.placed[layer.name], sim.quantization_enabled
        self._kind, self._function = layer.kind, layer.function
        self.module = layer.module
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)
        if layer.kind == "parameter":
            value = (
                entry.weight.quantized() if on and entry.carries_weight and entry.weight else call_layer(layer, (), {})
            )
            self.weight = value.detach().clone()
        elif on and entry.weight is not None and layer.module is not None:
            self.weight = entry.weight.quantized().detach().clone()
            bias = sim.corrected_bias(layer)
            self.bias = None if bias is None else bias.detach().clone()
        output = entry.output if on and entry.role is Role.QUANTIZED else None
        self._round = None if output is None or not output.enabled else _Rounding(output.required_encoding())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's value."""
        value = self._value(args, kwargs)
        return value if self._round is None else self._round(value)

    def _value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        if self._kind == "input":
            return args[0]
        if self._kind == "parameter":
            return self.weight
        if module is None:
            assert self._function is not None
            return self._function(*args, **kwargs)
        if self.weight is None:
            return module(*args, **kwargs)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module._conv_forward(args[0], self.weight, self.bias)
        if isinstance(module, nn.Linear):
            return torch.nn.functional.linear(args[0], self.weight, self.bias)
        replaced = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return functional_call(module, replaced, args, kwargs)


class _Rounding(nn.Module):
    """Rounds to a grid; the arithmetic of `fake_quantize`, out of place, for the compiler to fuse."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self._encoding, self._scalars = encoding, encoding.scalars

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid."""
        if self._scalars is not None:
            scale, low, high = self._scalars
            return (x / scale).round().clamp(low, high) * scale
        encoding = self._encoding
        scale_, zero_point = encoding.broadcast(x.shape)
        levels = (x / scale_).round()
        return torch.clamp(levels, encoding.qmin - zero_point, encoding.qmax - zero_point) * scale_
