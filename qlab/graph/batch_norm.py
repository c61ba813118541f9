"""BatchNorm layers, modules or functions, as what they are in inference: a factor and a shift a channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.graph.layer_graph import Layer


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """One BatchNorm layer: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta, channels on axis 1.

    Tensors are those of the model [C], None where the layer has none; derived values are float64.
    """

    layer: Layer
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_variance: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, layer: Layer) -> "BatchNorm | None":
        """The layer as a BatchNorm, None where it is none."""
        if layer.kind != "batch_norm":
            return None
        if layer.module is not None:
            module = layer.module
            return cls(layer, module.weight, module.bias, module.running_mean, module.running_var, module.eps)
        operands = [a if isinstance(a, Layer) and a.owner is not None else None for a in layer.args[1:5]]
        weight, bias, mean, variance = (None if a is None else getattr(a.owner, a.attribute) for a in operands)
        return cls(layer, weight, bias, mean, variance, layer.args[7])

    @property
    def has_statistics(self) -> bool:
        """Whether it keeps running statistics; without, it normalises by the batch even in eval mode."""
        return self.running_mean is not None and self.running_variance is not None

    @property
    def mean(self) -> Tensor:
        """The running mean."""
        assert self.running_mean is not None
        return self.running_mean.detach().double()

    @property
    def sigma(self) -> Tensor:
        """sqrt(running variance + epsilon)."""
        assert self.running_variance is not None
        return (self.running_variance.detach().double() + self.epsilon).sqrt()

    @property
    def gamma(self) -> Tensor:
        """The learned factor, 1 where there is none: up to its sign the standard deviation of the output."""
        return torch.ones_like(self.mean) if self.weight is None else self.weight.detach().double()

    @property
    def beta(self) -> Tensor:
        """The learned shift, 0 where there is none: the mean of the output."""
        return torch.zeros_like(self.mean) if self.bias is None else self.bias.detach().double()

    @property
    def factor(self) -> Tensor:
        """What a channel is multiplied by: gamma / sigma."""
        return self.gamma / self.sigma

    @property
    def shift(self) -> Tensor:
        """What is added to a channel after that: beta - mean * gamma / sigma."""
        return self.beta - self.mean * self.factor
