"""The tensors of a sim that files speak of: what they are called, which lie on a grid, and what they hold."""

from torch import Tensor, nn

from qlab.export.grids import IntegerType
from qlab.graph import Layer
from qlab.quantization import Quantizer, WeightQuantizer, dequantize, fake_quantize
from qlab.sim import QuantSim, Role
from qlab.sim.placement import Placed


class ParameterNames:
    """The user's own name of each parameter and buffer; a shared one has the first of its names."""

    def __init__(self, root: nn.Module) -> None:
        first: dict[int, str] = {}
        self._names: dict[tuple[int, str], str] = {}
        self._aliases: dict[str, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            for attribute, value in (*module._parameters.items(), *module._buffers.items()):
                if value is None:
                    continue
                name = f"{path}.{attribute}" if path else attribute
                self._names.setdefault((id(module), attribute), first.setdefault(id(value), name))
                self._aliases.setdefault(first[id(value)], []).append(name)

    def of(self, owner: nn.Module, attribute: str) -> str:
        """The name of `owner.attribute`."""
        return self._names[id(owner), attribute]

    def aliases(self, name: str) -> list[str]:
        """All names of the parameter whose first name is `name`, that one included."""
        return self._aliases[name]

    def weight(self, quantizer: WeightQuantizer) -> str:
        """The name of the parameter that `quantizer` belongs to."""
        return self.of(quantizer.owner, quantizer.attribute)


def bias_name(layer: Layer) -> str:
    """The name of the bias of a layer that is a call of a module; a module called twice has one."""
    return f"{layer.path}.bias"


def updated_values(sim: QuantSim) -> dict[str, Tensor]:
    """The parameters that a target should quantize, where they differ from the float model's, by name.

    A weight whose integers were chosen by a technique, or are limited more narrowly than their type, is given on its
    grid: rounding it to nearest then yields those integers. Biases include their correction.
    """
    names, values = ParameterNames(sim.model), {}
    for layer in sim.graph:
        quantizer = sim.placed[layer.name].weight
        if quantizer is None or not quantizer.enabled:
            continue
        encoding = quantizer.required_encoding()
        if quantizer.rounding is not None:
            values[names.weight(quantizer)] = dequantize(quantizer.rounding, encoding)
        elif not IntegerType.holding(encoding).is_filled_by(encoding):
            values[names.weight(quantizer)] = fake_quantize(quantizer.weight.detach(), encoding)
        if quantizer.bias_correction is not None and layer.module is not None:
            bias = layer.module.bias
            correction = quantizer.bias_correction
            values[bias_name(layer)] = correction if bias is None else (bias + correction).detach()
    return values


def governed(sim: QuantSim) -> list[tuple[Layer, Placed, Quantizer]]:
    """Layers whose value lies on a grid that is in force, with the quantizer that governs it, in order."""
    return [
        (entry.layer, entry, entry.output)
        for entry in sim.placed.values()
        if entry.role in (Role.QUANTIZED, Role.INHERITS)
        and entry.output is not None
        and entry.output.enabled
        and entry.layer.is_float
        and entry.layer.kind not in ("mask", "cast")
    ]


def weight_quantizers(sim: QuantSim) -> dict[str, WeightQuantizer]:
    """The enabled weight quantizers by parameter name."""
    names = ParameterNames(sim.model)
    found = (entry.weight for entry in sim.placed.values())
    return {names.weight(q): q for q in found if q is not None and q.enabled}
