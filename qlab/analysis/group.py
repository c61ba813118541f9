"""A layer with what is computed as one with it, cut out of the model: run it with other weights on given inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import functional_call

from qlab.errors import InputError
from qlab.graph import Layer, call_layer, fill
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import QuantSim, Role


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose last output is rounded once.

    layers: in order of execution. weight: the quantizer of the weight in it, if any. output: the quantizer of the last
    output, None where that stays float. outside: indices of the layers whose values go in (an input goes in itself).
    """

    sim: QuantSim
    layers: tuple[Layer, ...]
    weight: WeightQuantizer | None
    output: Quantizer | None
    outside: frozenset[int]

    @classmethod
    def of(cls, sim: QuantSim, name: str) -> "Group":
        """The group that `name` belongs to; for a layer that passes values on, the one whose grid they lie on.

        Raises UnknownLayer, or InputError where nothing of the layer is quantized.
        """
        sim[name]
        entry = sim.placed[name]
        if entry.carries_weight:
            return cls.of(sim, next(user.name for user in entry.layer.users))
        if entry.role is Role.INHERITS and entry.output is not None:
            return cls.of(sim, entry.output.name)
        if entry.weight is None and entry.output is None:
            raise InputError(f"nothing of layer {name!r} is quantized ({entry.reason}): there is nothing to diagnose.")
        last = entry.layer
        while sim.placed[last.name].role is Role.FUSED:
            last = next(user for user in last.users if user.kind != "size")
        chain = [last]
        while before := [source for source in chain[0].inputs if _is_fused_into(sim, source, chain[0])]:
            chain.insert(0, before[0])
        inside = {layer.index for layer in chain}
        weights = [sim.placed[layer.name].weight for layer in chain if sim.placed[layer.name].weight is not None]
        own = sim.placed[last.name]
        return cls(
            sim,
            tuple(chain),
            weights[0] if weights else None,
            own.output if own.role is Role.QUANTIZED else None,
            frozenset({source.index for layer in chain for source in layer.inputs} - inside)
            | {layer.index for layer in chain if layer.kind == "input"},
        )

    @property
    def last(self) -> Layer:
        """The layer whose output is rounded."""
        return self.layers[-1]

    @property
    def weighted(self) -> Layer | None:
        """The layer with the weight."""
        return next((layer for layer in self.layers if self.sim.placed[layer.name].weight is not None), None)

    def run(self, values: Sequence[Any], weight: Tensor | None) -> Tensor:
        """The last output, not rounded, in float but for `weight`, from the values of the layers outside."""
        values, weighted = list(values), self.weighted
        for index in self.outside:
            if self.sim.placed[self.sim.graph.layers[index].name].carries_weight:
                values[index] = weight
        for layer in self.layers:
            args, kwargs = fill(layer.args, values), fill(layer.kwargs, values)
            if layer is weighted and layer.module is not None:
                values[layer.index] = functional_call(layer.module, {"weight": weight}, args, kwargs)
            elif layer.kind != "input":
                values[layer.index] = call_layer(layer, args, kwargs)
        return values[self.last.index]

    def run_quantized(self, values: Sequence[Any]) -> Tensor:
        """The last output as the sim computes it before it is rounded: with its weight and its bias."""
        values = list(values)
        for layer in self.layers:
            if layer.kind != "input":
                values[layer.index] = self.sim.compute(layer, fill(layer.args, values), fill(layer.kwargs, values))
        return values[self.last.index]


def _is_fused_into(sim: QuantSim, source: Layer, layer: Layer) -> bool:
    entry = sim.placed[source.name]
    follows = [user for user in source.users if user.kind != "size"]
    return entry.role is Role.FUSED and not entry.carries_weight and follows == [layer]
