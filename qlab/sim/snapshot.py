"""Snapshot: the whole state of a sim, to return to when a technique is cancelled, fails or is undone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlab.mapped import duplicate, is_mapped, is_unchanged
from qlab.quantization import Quantizer

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim


class Snapshot:
    """Remembers `sim` as it is now; `restore` brings it back, in place, bit for bit.

    weights False leaves parameters and buffers of the model out: enough, and much smaller, where only settings of
    quantizers are about to change.
    """

    def __init__(self, sim: "QuantSim", weights: bool = True) -> None:
        self._sim = sim
        self._log = list(sim.log)
        self._flags = (sim.quantization_enabled, sim.preset, sim.qat_mode)
        self._training = [(module, module.training) for module in sim.modules()]
        self._quantizers = {name: quantizer.state() for name, quantizer in _quantizers(sim)}
        self._model: dict[str, tuple[Tensor, Tensor]] | None = None
        if weights:
            self._model = {name: (t, duplicate(t)) for name, t in _tensors(sim.model).items()}
            self._layers = [
                (layer, layer.module, layer.function, layer.kind, layer.args, layer.kwargs) for layer in sim.graph
            ]
            self._modules = dict(sim.model.named_modules(remove_duplicate=False))
            self._edits, self._folded = list(sim.graph.edits), dict(sim.graph.folded)

    @property
    def bytes(self) -> int:
        """Memory held for weights."""
        copies = (copy for _, copy in (self._model or {}).values() if not is_mapped(copy))
        return sum(copy.numel() * copy.element_size() for copy in copies)

    def restore(self) -> None:
        """Changes the sim back to the remembered state. May be called more than once."""
        sim = self._sim
        sim.log[:] = self._log
        if self._model is not None:
            self._restore_model(sim)
        for name, quantizer in _quantizers(sim):
            quantizer.set_state(self._quantizers[name])
        sim.quantization_enabled, sim.preset, sim.qat_mode = self._flags
        for module, training in self._training:
            module.training = training
        sim.changed()

    def _restore_model(self, sim: "QuantSim") -> None:
        for name, module in self._modules.items():
            parent, _, attribute = name.rpartition(".")
            if name and getattr(self._modules[parent], attribute) is not module:
                setattr(self._modules[parent], attribute, module)
        for layer, module_, function, kind, args, kwargs in self._layers:
            layer.module, layer.function, layer.kind, layer.args, layer.kwargs = module_, function, kind, args, kwargs
        sim.graph.edits[:] = self._edits
        sim.graph.folded = dict(self._folded)
        sim.graph.link()
        assert self._model is not None
        present = _tensors(sim.model)
        for name in present.keys() - self._model.keys():  # a bias that folding added
            owner, attribute = _owner(sim.model, name)
            owner._parameters[attribute] = None
        with torch.no_grad():
            for name, (tensor, copy) in self._model.items():
                owner, attribute = _owner(sim.model, name)
                store = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
                store[attribute] = tensor
                if not is_unchanged(tensor, copy):
                    tensor.data = copy.clone() if tensor.shape != copy.shape else tensor.data
                    tensor.copy_(copy)


@contextmanager
def transaction(sim: "QuantSim", weights: bool = True) -> Iterator[None]:
    """Within the context `sim` may be changed; on any error, Ctrl-C among them, it is as it was. weights: see Snapshot.

    So is torch's gradient mode, which an interrupt inside `torch.no_grad` can leave switched off.
    """
    snapshot, gradient = Snapshot(sim, weights), torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(gradient)
        snapshot.restore()
        raise


def _quantizers(sim: "QuantSim") -> list[tuple[str, Quantizer]]:
    return [(name, quantizer) for name, quantizer in sim.quantizers.items() if isinstance(quantizer, Quantizer)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute
