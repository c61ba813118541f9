"""How one layer is computed: with its quantized weight and the target's bias, then rounded to its output's grid.

What can be decided once is decided when a step is made; what a person may change at any time (a quantizer's settings,
its encoding, a weight) is asked for at each call.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlab.graph import Layer, call_layer
from qlab.sim.integer_kernels import integer_kernel
from qlab.sim.placement import Role

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim


_NARROW = 160  # channels, in and out
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CLAMPS_AT = {"relu": math.inf, "relu6": 6.0}  # layers that clamp to [0, that], which rounding may do as well
_MAKES_NEW = (
    "conv",
    "depthwise_conv",
    "conv_transpose",
    "linear",
    "batch_norm",
    "add",
)  # results in memory of their own


class LayerStep:
    """One layer of a sim, to be called as `LayerGraph.run` calls layers."""

    def __init__(self, sim: "QuantSim", layer: Layer) -> None:
        entry = sim.placed[layer.name]
        self.weight = entry.weight
        self.output = entry.output if entry.role is Role.QUANTIZED else None
        self.sim, self.layer = sim, layer
        self._compute: Callable[..., Any]
        if entry.carries_weight:
            self._compute = _carry
        elif self.weight is None or layer.module is None:
            self._compute = _batch_norm if type(layer.module) in _BATCH_NORMS else _plain
        else:
            self._compute = _WITH_WEIGHT.get(type(layer.module), _functional)
        self._integer = integer_kernel(sim, layer) if sim.preset.int32_bias else None
        self.is_product = _is_product(layer.module)
        self._clamps_at = _CLAMPS_AT.get(layer.kind)
        self._dying = _dying(sim, layer) if self._clamps_at is not None else ()

    def __call__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], overwrite: bool = False) -> Any:
        """The layer's value, on the grid of its output where it has one.

        overwrite: an argument that no other layer takes may be overwritten.
        """
        output = self.output
        if output is None or not output.enabled:
            return self._value(layer, args, kwargs)
        differentiable = torch.is_grad_enabled()
        if self._clamps_at is not None and output.clamps_at(self._clamps_at):
            if not differentiable and overwrite and self._input_dies():
                return output.quantize_(args[0])
            if not differentiable or self._clamps_at == math.inf:  # ReLU6 has no gradient beyond 6
                return output(args[0], True)
        value = self._value(layer, args, kwargs)
        if differentiable and (value.requires_grad or output.learned is not None):
            return output(value)
        return output.quantize_(value) if _is_fresh(value, args, layer) else output(value)

    def _input_dies(self) -> bool:
        """Whether nothing needs the layer's input after it: no other layer, and no hook that has seen it."""
        return bool(self._dying) and not any(_is_hooked(source) for source in self._dying)

    def compute(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's value before it is rounded, in floating point."""
        return self._compute(self, layer, args, kwargs)

    def _value(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As an integer kernel computes it, where one would; gradients are those of the float computation."""
        differentiable = torch.is_grad_enabled()
        if self._integer is None or (differentiable and self.sim.training):
            return self._compute(self, layer, args, kwargs)
        with torch.no_grad():
            exact = self._integer(args, self.sim.corrected_bias(layer))
        if exact is None or differentiable:
            value = self._compute(self, layer, args, kwargs)
            return value if exact is None else value + (exact - value).detach()
        return exact

    def bias(self, module: nn.Module) -> Tensor | None:
        """The bias the target adds: corrected, and on the int32 grid where the preset asks for it."""
        bias = self.sim.corrected_bias(self.layer)
        scale = None if bias is None else self.sim.bias_scale(self.layer)
        if bias is None or scale is None:
            return bias
        # float64: an int32 bias has more digits than float32
        exact = (bias.double() / scale.double()).round().float() * scale
        return exact.detach().to(bias.dtype) + (bias - bias.detach())  # the gradient passes straight through


def _dying(sim: "QuantSim", layer: Layer) -> tuple[Layer, ...]:
    """The layers that pass on the value that `layer` takes, where it is new memory and serves this layer alone."""
    if sim.graph.runs_whole:  # not every user is known
        return ()
    found = []
    (source,) = layer.inputs
    while len(source.users) == 1 and not any(source is output for output in sim.graph.outputs):
        found.append(source)
        if source.kind in _MAKES_NEW:
            return tuple(found)
        if source.kind != "identity":  # such as a BatchNorm that was folded away
            break
        (source,) = source.inputs
    return ()


def _is_hooked(layer: Layer) -> bool:
    """Whether somebody listens to the module, who may keep what it returned."""
    return layer.module is not None and bool(layer.module._forward_hooks)


def _is_fresh(value: Tensor, args: tuple[Any, ...], layer: Layer) -> bool:
    """Whether nothing else can see the memory of `value`, so that it may be overwritten."""
    if layer.kind in ("input", "parameter") or not isinstance(value, Tensor) or value.requires_grad:
        return False
    pointer = value.untyped_storage().data_ptr()
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.untyped_storage().data_ptr() == pointer:
                return False
        elif isinstance(arg, (list, tuple)) and not _is_fresh(value, tuple(arg), layer):
            return False
    return True


def _plain(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call_layer(layer, args, kwargs)


def _batch_norm(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the module computes it, without the module's own way there, which small networks feel."""
    module: Any = layer.module
    tensors, is_hooked = module._buffers, module._forward_hooks or module._forward_pre_hooks
    if module.training or is_hooked or tensors["running_mean"] is None or torch.is_grad_enabled():
        return call_layer(layer, args, kwargs)
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    mean, variance = tensors["running_mean"], tensors["running_var"]
    on_cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(args[0], weight, bias, mean, variance, False, 0.0, module.eps, on_cudnn)


def _carry(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    assert step.weight is not None
    return step.weight.quantized()


def _functional(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    module = layer.module
    assert module is not None
    assert step.weight is not None
    replaced = {"weight": step.weight.quantized()}
    bias = step.bias(module) if hasattr(module, "bias") else None
    if bias is not None:
        replaced["bias"] = bias
    return functional_call(module, replaced, args, kwargs)


def _conv(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    module: Any = layer.module
    assert step.weight is not None
    weight, bias, x = step.weight.quantized(), step.bias(module), args[0]
    if step.is_product and step.weight.enabled and x.dim() == 4 and x.is_contiguous() and not step.sim.training:
        return _product(x, weight, bias)
    return module._conv_forward(x, weight, bias)


def _is_product(module: nn.Module | None) -> bool:
    """Whether a convolution multiplies the channels at each place by a narrow matrix and does nothing else."""
    return (
        isinstance(module, nn.Conv2d)
        and max(module.in_channels, module.out_channels) <= _NARROW
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        and (module.padding in ((0, 0), "same", "valid"))
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as the matrix product that it is.

    As fast as a convolution and closer to targets: its sums run over the channels in order and end with the bias, as
    in ONNX Runtime's float kernel, so that fewer of them round to the other side of a half step. Not so for wide
    matrices: there ONNX Runtime sums in blocks, and with several threads a convolution was seen to be twice as fast.
    """
    weights, places = weight.flatten(1).expand(x.shape[0], -1, -1), x.view(*x.shape[:2], -1)
    sums = torch.bmm(weights, places) if bias is None else torch.baddbmm(bias.view(-1, 1), weights, places)
    return sums.view(*sums.shape[:2], *x.shape[2:])


def _linear(step: LayerStep, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return F.linear(args[0], step.weight.quantized(), step.bias(layer.module))  # type: ignore[union-attr]


_WITH_WEIGHT: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Linear: _linear,
}
