"""QuantizedLayer: one layer of a sim as the person sees it."""

from qlab.graph import Layer
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim.placement import Placed, Role


class QuantizedLayer:
    """One layer of a sim as the person sees it: its quantizers, its role and where it came from.

    `output` is the quantizer that governs the layer's output: its own, that of the fused group it belongs to, or of
    the input whose grid it inherits; None where the output stays float. `weight` is None where there is no weight.
    """

    __slots__ = ("_placed",)

    def __init__(self, placed: Placed) -> None:
        self._placed = placed

    @property
    def layer(self) -> Layer:
        """The captured layer."""
        return self._placed.layer

    @property
    def name(self) -> str:
        """The user's own name of the layer."""
        return self._placed.layer.name

    @property
    def kind(self) -> str:
        """What the layer computes, as one word."""
        return self._placed.layer.kind

    @property
    def role(self) -> Role:
        """What happens to the output."""
        return self._placed.role

    @property
    def reason(self) -> str:
        """Why the layer has its role, where that needs saying."""
        return self._placed.reason

    @property
    def weight(self) -> WeightQuantizer | None:
        """The quantizer of the layer's weight."""
        return self._placed.weight

    @property
    def output(self) -> Quantizer | None:
        """The quantizer that governs the layer's output."""
        return self._placed.output

    def __repr__(self) -> str:
        parts = [f"{self.name!r} ({self.layer.title})"]
        if self.weight is not None:
            parts.append(f"weight {self.weight.spec}" + ("" if self.weight.enabled else " off"))
        if self.output is not None:
            own = "" if self.role is Role.QUANTIZED else f" ({self.reason})"
            parts.append(f"output {self.output.spec}" + ("" if self.output.enabled else " off") + own)
        else:
            parts.append(f"output float: {self.reason}")
        return "Layer " + ", ".join(parts)
