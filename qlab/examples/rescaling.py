"""Makes a network hard to quantize without changing what it computes.

Every channel between two consecutive layers is multiplied by a random factor in the first and divided by it in the
second. ReLU lets positive factors through, so the float function stays; but one grid for a whole weight now has to
hold small and large channels together. Cross-layer equalization undoes this (Nagel et al. 2019, arXiv:1906.04721).
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import fusion

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def rescale(
    model: nn.Module, spread: tuple[float, float] = (0.25, 4.0), seed: int = 0, fold: bool = False
) -> nn.Module:
    """Return a copy whose consecutive layers (convolutions or linear, with ReLU between) are rescaled by channel.

    Factors are log-uniform over `spread`; (0.03, 30.0) covers three orders of magnitude. A BatchNorm after the first
    layer carries that layer's factors; `fold=True` first folds every BatchNorm that follows a convolution, so that they
    stand in the weights themselves. The copy is in eval mode; the model must be one that torch.fx can trace.

    Raises ValueError if the model has no such layers, or if the spread is not two positive numbers in order.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> rescaled = rescale(model, spread=(8.0, 8.0))
    >>> (rescaled[0].weight / model[0].weight).flatten().tolist()
    [8.0, 8.0]
    >>> (rescaled[2].weight / model[2].weight).flatten().tolist()
    [0.125, 0.125]
    """
    low, high = spread
    if not 0 < low <= high:
        raise ValueError(f"spread must be two positive numbers, the smaller one first; got {spread}.")
    rescaled = copy.deepcopy(model).eval()
    if fold:
        _fold_batch_norms(rescaled)
    pairs = _Steps(rescaled).pairs()
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no two convolutions, and no two linear layers, with only BatchNorm and ReLU "
            "between them: there is nothing to rescale."
        )
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs:
        second = rescaled.get_submodule(pair.second)
        channels = second.weight.shape[1] * getattr(second, "groups", 1)
        factors = low * (high / low) ** torch.rand(channels, generator=generator, dtype=torch.float64)
        _scale_outputs(rescaled.get_submodule(pair.norm or pair.first), factors)
        _scale_inputs(second, 1 / factors)
    return rescaled


@torch.no_grad()
def _scale_outputs(layer: nn.Module, factors: Tensor) -> None:
    """Change `layer`: output channel i is multiplied by factors[i]."""
    layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


@torch.no_grad()
def _scale_inputs(layer: nn.Module, factors: Tensor) -> None:
    """Change `layer`: its weight on input channel i is multiplied by factors[i]."""
    groups = getattr(layer, "groups", 1)
    by_group = layer.weight.view(groups, -1, *layer.weight.shape[1:])
    by_group.mul_(factors.reshape(groups, 1, -1, *[1] * (layer.weight.dim() - 2)))


def _fold_batch_norms(model: nn.Module) -> None:
    """Change `model`: a convolution absorbs the BatchNorm that alone reads it, which becomes an Identity."""
    for conv, norm in _Steps(model).normalised_convolutions():
        model.set_submodule(conv, fusion.fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm)))
        model.set_submodule(norm, nn.Identity())


@dataclass(frozen=True)
class _Pair:
    """Names of two layers, and of the BatchNorm after the first if there is one."""

    first: str
    norm: str | None
    second: str


class _Steps:
    """What reads what in a model, as traced by torch.fx."""

    def __init__(self, model: nn.Module) -> None:
        self._nodes = list(fx.symbolic_trace(model).graph.nodes)
        self._modules = dict(model.named_modules())
        self._calls = Counter(node.target for node in self._nodes if node.op == "call_module")

    def pairs(self) -> list[_Pair]:
        found = []
        for node in self._nodes:
            kinds = next((kinds for kinds in (CONVOLUTIONS, nn.Linear) if self._is_layer(node, kinds)), None)
            if kinds is None:
                continue
            reader, norm = self._only_reader(node), None
            if self._is_layer(reader, BATCH_NORMS):
                norm = reader.target
                reader = self._only_reader(reader)
            if self._is_relu(reader) and self._is_layer(second := self._only_reader(reader), kinds):
                found.append(_Pair(node.target, norm, second.target))
        return found

    def normalised_convolutions(self) -> list[tuple[str, str]]:
        convolutions = [node for node in self._nodes if self._is_layer(node, CONVOLUTIONS)]
        readers = [self._only_reader(node) for node in convolutions]
        both = zip(convolutions, readers, strict=True)
        return [(conv.target, reader.target) for conv, reader in both if self._is_layer(reader, BATCH_NORMS)]

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one step that reads `node`, looking through Identity; None if several do."""
        if len(node.users) != 1:
            return None
        reader = next(iter(node.users))
        is_identity = reader.op == "call_module" and isinstance(self._modules[reader.target], nn.Identity)
        return self._only_reader(reader) if is_identity else reader

    def _is_layer(self, node: fx.Node | None, kinds: type | tuple[type, ...]) -> TypeGuard[fx.Node]:
        """Whether the step is a module of these kinds that has weights and is called nowhere else."""
        if node is None or node.op != "call_module" or self._calls[node.target] > 1:
            return False
        module = self._modules[node.target]
        return isinstance(module, kinds) and getattr(module, "weight", None) is not None

    def _is_relu(self, node: fx.Node | None) -> TypeGuard[fx.Node]:
        if node is None:
            return False
        if node.op == "call_module":
            return isinstance(self._modules[node.target], nn.ReLU)
        return node.target in (torch.relu, functional.relu, "relu")
