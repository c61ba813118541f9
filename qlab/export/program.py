"""A sim as a `torch.export` program with quantize and dequantize operators, for ExecuTorch, Inductor and their like.

The operators are PyTorch's own `quantized_decomposed`, which whoever loads the program has to register first, by
`import torch.ao.quantization.fx._decomposed`. Weights are integers under the user's own parameter names.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlab.export.float_model import example_inputs
from qlab.export.grids import IntegerType
from qlab.export.tensors import bias_name, updated_values
from qlab.graph import Layer, call_layer
from qlab.quantization import Encoding, WeightQuantizer, quantize
from qlab.sim import QuantSim, Role


def program(sim: QuantSim) -> torch.export.ExportedProgram:
    """The simulation as a program for any batch size. `sim` is not changed."""
    import torch.ao.quantization.fx._decomposed

    inputs, shapes = example_inputs(sim)
    module = _Program(sim).eval()
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)


class _Program(nn.Module):
    """A copy of the sim as a module of flat tensor inputs, its weights replaced by their integers."""

    def __init__(self, sim: QuantSim) -> None:
        super().__init__()
        values = updated_values(sim)
        twin = copy.deepcopy(sim).eval()
        self.model = twin.model
        self._sim = (twin,)  # not a child: the quantizers become operators
        self._grids: dict[int, Encoding] = {}  # by id: the exporter prints the keys of what it traces
        for layer in twin.graph:
            quantizer = twin.placed[layer.name].weight
            if quantizer is not None and quantizer.enabled:
                self._set_bias(layer, values)
                if id(quantizer) not in self._grids:
                    self._set_weight(quantizer)

    def forward(self, *tensors: Tensor) -> Any:
        sim, given = self._sim[0], iter(tensors)
        flat = [next(given) if layer.shape is not None else None for layer in sim.graph.input_layers]
        return sim.graph.run(flat, self._call)

    def _set_weight(self, quantizer: WeightQuantizer) -> None:
        encoding = quantizer.required_encoding()
        weight = quantizer.weight.detach()
        codes = quantizer.rounding if quantizer.rounding is not None else quantize(weight, encoding)
        codes = codes.to(_dtype(encoding))
        for module in self.model.modules():  # a tied weight has several owners
            for attribute, parameter in tuple(module._parameters.items()):
                if parameter is quantizer.weight and module is not quantizer.owner:
                    del module._parameters[attribute]
                    module.register_buffer(attribute, codes)
        owner: Any = quantizer.owner
        del owner._parameters[quantizer.attribute]
        owner.register_buffer(quantizer.attribute, codes)
        self._grids[id(quantizer)] = encoding

    def _set_bias(self, layer: Layer, values: dict[str, Tensor]) -> None:
        """The bias as the target adds it; a module that is called twice has one bias, which stays in float."""
        module: Any = layer.module
        if module is None or layer.name != layer.path:
            return
        bias = values.get(bias_name(layer), getattr(module, "bias", None))
        scale = self._sim[0].bias_scale(layer)
        if bias is not None and scale is not None and f"{layer.path}@1" not in self._sim[0].graph:
            bias = ((bias.double() / scale.double()).round() * scale.double()).float()
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self._sim[0].placed[layer.name]
        quantizer = entry.weight if id(entry.weight) in self._grids else None
        if quantizer is not None and entry.carries_weight:
            return self._weight(quantizer, call_layer(layer, args, kwargs))
        if quantizer is not None and layer.module is not None:
            value = self._with_weight(layer, quantizer, args, kwargs)
        else:
            value = call_layer(layer, args, kwargs)
        output = entry.output
        if entry.role is not Role.QUANTIZED or output is None or not output.enabled:
            return value
        return _round(value, output.required_encoding())

    def _with_weight(self, layer: Layer, quantizer: WeightQuantizer, args: Any, kwargs: Any) -> Any:
        module: Any = layer.module
        weight = self._weight(quantizer, module.weight)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module._conv_forward(args[0], weight, module.bias)
        if isinstance(module, nn.Linear):
            return F.linear(args[0], weight, module.bias)
        return functional_call(module, {"weight": weight}, args, kwargs)

    def _weight(self, quantizer: WeightQuantizer, codes: Tensor) -> Tensor:
        return _dequantize(codes, self._grids[id(quantizer)])


def _round(x: Tensor, encoding: Encoding) -> Tensor:
    ops: Any = torch.ops.quantized_decomposed
    dtype = _dtype(encoding)
    if encoding.scale.dim() == 0:
        grid = (float(encoding.scale), int(encoding.zero_point), encoding.qmin, encoding.qmax, dtype)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *grid), *grid)
    axis = encoding.axis if encoding.axis is not None else 0
    grid = (encoding.scale, encoding.zero_point.long(), axis % x.dim(), encoding.qmin, encoding.qmax, dtype)  # type: ignore[assignment]
    return ops.dequantize_per_channel(ops.quantize_per_channel(x, *grid), *grid)


def _dequantize(codes: Tensor, encoding: Encoding) -> Tensor:
    ops: Any = torch.ops.quantized_decomposed
    limits = encoding.qmin, encoding.qmax, codes.dtype
    if encoding.scale.dim() == 0:
        return ops.dequantize_per_tensor(codes, float(encoding.scale), int(encoding.zero_point), *limits)
    if encoding.block_size is None:
        return ops.dequantize_per_channel(codes, encoding.scale, encoding.zero_point.long(), encoding.axis, *limits)
    scale, zero_point = encoding.broadcast(codes.shape)  # the group operator knows matrices only
    return (codes.float() - zero_point) * scale


def _dtype(encoding: Encoding) -> torch.dtype:
    """The torch type that holds the grid: 4-bit integers are kept in bytes."""
    return getattr(torch, IntegerType.holding(encoding).name.replace("int4", "int8"))
