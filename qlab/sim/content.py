"""What a layer's value depends on, as a key: weights, settings and everything before it, by content.

Equal keys mean equal values for equal data, in another sim or another process as well. What was measured or computed
for a layer is kept under its key and is found again only where it still holds.
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.graph import Layer
from qlab.mapped import let_go
from qlab.quantization import Encoding, Quantizer, WeightQuantizer

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim


def content_keys(sim: "QuantSim", quantized: bool = True) -> dict[str, str]:
    """A key for the value of every layer: of the float model, or of the sim in its present state.

    A key covers the layer's operation, parameters, buffers and quantizers, and the keys of its inputs; not the data.
    """
    return dict(keys_in_order(sim, quantized))


def keys_in_order(sim: "QuantSim", quantized: bool = True, ranges: bool = True) -> Iterator[tuple[str, str]]:
    """(name, key) of layer after layer, each of the sim's state at the moment it is asked for.

    ranges False leaves out the measured ranges of activations: calibrating again changes no key.
    """
    keys: dict[str, str] = {}
    for layer in sim.graph:
        digest = hashlib.sha256()
        describe = [_operation(layer), *(keys[source.name] for source in layer.inputs)]
        digest.update(repr(describe).encode())
        for name, tensor in _tensors(layer):
            digest.update(name.encode())
            update_with_tensor(digest, tensor)
        if quantized:
            _update_with_quantizers(digest, sim, layer, ranges)
        keys[layer.name] = digest.hexdigest()
        yield layer.name, keys[layer.name]


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Changes `digest` (of hashlib): adds type, shape and every byte of `tensor`."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    let_go(tensor)


def _operation(layer: Layer) -> str:
    """The operation with its arguments, inputs by their number."""
    numbers = {id(source): f"input {number}" for number, source in enumerate(layer.inputs)}
    leaves, structure = pytree.tree_flatten((layer.args, layer.kwargs))
    told = [numbers.get(id(leaf), repr(leaf)) for leaf in leaves]
    return f"{layer.kind} {layer.module!r} {layer.function} {told} {structure}"


def _tensors(layer: Layer) -> list[tuple[str, Tensor]]:
    if layer.owner is not None:
        return [(layer.attribute, getattr(layer.owner, layer.attribute))]
    if layer.module is None:
        return []
    return [*layer.module.named_parameters(), *layer.module.named_buffers()]


def _update_with_quantizers(digest: Any, sim: "QuantSim", layer: Layer, ranges: bool) -> None:
    entry = sim.placed[layer.name]
    digest.update(f"{entry.role} {sim.preset.int32_bias}".encode())
    for quantizer in (entry.weight, entry.output):
        if quantizer is None:
            continue
        digest.update(f"{quantizer.spec} {quantizer.spec.known_range} {quantizer.enabled} {quantizer.frozen}".encode())
        if ranges or isinstance(quantizer, WeightQuantizer):
            _update_with_grid(digest, quantizer)


def _update_with_grid(digest: Any, quantizer: Quantizer) -> None:
    encoding = quantizer.encoding
    if isinstance(encoding, Encoding):
        limits = (encoding.qmin, encoding.qmax, encoding.axis, encoding.block_size, encoding.block_axis)
        digest.update(repr(limits).encode())
        update_with_tensor(digest, encoding.scale)
        update_with_tensor(digest, encoding.zero_point)
    if isinstance(quantizer, WeightQuantizer):
        for name, part in (("codes", quantizer.rounding), ("correction", quantizer.bias_correction)):
            if part is not None:
                digest.update(name.encode())
                update_with_tensor(digest, part)
