"""Layers that mix channels by a weight, as what they do to each channel: one view for every kind of them."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from qlab.graph.layer_graph import Layer
from qlab.graph.linear_form import LinearForm, linear_form


@dataclass(frozen=True)
class Kernel:
    """A layer that mixes channels by a weight: convolution, transposed convolution or linear, module or function.

    Its weight is seen as [groups, outputs, inputs, positions], outputs and inputs counted within a group, so that
    channel o of the output is at [o // outputs, o % outputs].
    """

    layer: Layer
    form: LinearForm

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def source(self) -> Layer:
        """The layer whose value it takes."""
        return self.layer.args[self.form.operand]

    @property
    def weight(self) -> nn.Parameter:
        """The float weight, in its own layout."""
        source = self.layer.weight_source
        assert source is not None
        return getattr(source[0], source[1])

    @property
    def bias(self) -> Tensor | None:
        """The float bias [outputs of all groups], None where there is none."""
        if self.layer.module is not None:
            return self.layer.module.bias
        operand = self._bias_operand
        return None if operand is None else getattr(operand.owner, operand.attribute)

    @property
    def can_take_bias(self) -> bool:
        """Whether there is a bias, or one can be added."""
        return self.layer.module is not None or self._bias_operand is not None

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.form.groups * self.form.outputs

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return self.form.groups * (self.form.inputs // self._positions)

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel comes from one input channel of its own."""
        return self.form.groups > 1 and self.form.outputs == 1 and self.inputs == self.form.groups

    @property
    def channel_axis(self) -> int:
        """The axis of output channels: 1 for convolutions, the last one for linear layers."""
        return 1 if self.form.windows is not None else len(self.layer.shape or ()) - 1

    @property
    def pads_with_zeros(self) -> bool:
        """Whether it sees zeros around its input; also every transposed convolution, which spreads it with zeros."""
        windows = self.form.windows
        if windows is None:
            return False
        return windows.transposed or (windows.mode == "constant" and any(map(any, windows.padding)))

    def grouped(self, weight: Tensor | None = None) -> Tensor:
        """A float64 copy of the weight, or of anything of its shape, as [groups, outputs, inputs, positions]."""
        matrix = self.form.matrix((self.weight if weight is None else weight).detach().double())
        return matrix.reshape(*matrix.shape[:2], -1, self._positions)

    def factors(self, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """Factors a channel, [outputs] and [inputs], as one factor an entry of the weight, in its own layout."""
        form = self.form
        shape = (form.groups, form.outputs, form.inputs // self._positions, self._positions)
        found = torch.ones(shape, dtype=torch.float64, device=self.weight.device)
        if outputs is not None:
            found = found * outputs.double().view(form.groups, -1, 1, 1)
        if inputs is not None:
            found = found * inputs.double().view(form.groups, 1, -1, 1)
        return form.weight(found.reshape(form.groups, form.outputs, form.inputs), self.weight.shape)

    def response(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """What a constant input, `values` [inputs], adds to each output channel away from borders: [outputs].

        weight: another one of the same shape in place of the kernel's own.
        """
        grouped = self.grouped(weight)
        by_group = values.to(grouped.device).double().view(self.form.groups, -1)
        return torch.einsum("goip,gi->go", grouped, by_group).reshape(-1)

    @torch.no_grad()
    def shift_bias(self, shift: Tensor) -> None:
        """Changes the layer: adds `shift` [outputs] to its bias, which is created where there is none."""
        weight, bias = self.weight, self.bias
        if bias is not None:
            bias.copy_(bias.double() + shift.to(bias.device))
            return
        bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        self.layer.module.bias = bias  # type: ignore[union-attr]

    @property
    def _positions(self) -> int:
        return prod(self.form.windows.kernel) if self.form.windows is not None else 1

    @property
    def _bias_operand(self) -> Layer | None:
        position = 0 if self.layer.function_name == "addmm" else 2
        operand = self.layer.args[position] if len(self.layer.args) > position else None
        return operand if isinstance(operand, Layer) and operand.owner is not None else None


def kernel_of(layer: Layer) -> Kernel | None:
    """The layer as a kernel, None where it is none or its weight is no parameter of one matrix."""
    source = layer.weight_source
    if source is None or source[1] not in source[0]._parameters or layer.function_name in ("bmm", "convolution"):
        return None
    form = linear_form(layer)
    if form is None or (form.windows is None and form.groups > 1):
        return None
    operand = layer.args[form.operand] if len(layer.args) > form.operand else None
    return Kernel(layer, form) if isinstance(operand, Layer) and operand.owner is None else None
