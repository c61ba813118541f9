"""WeightQuantizer: the quantizer of one parameter.

It reads its range from the weight itself, and keeps the quantized weight until weight or encoding change.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import NonFiniteData, SpecError
from qlab.mapped import in_file, is_mapped, let_go
from qlab.quantization.encoding import Encoding
from qlab.quantization.fake_quantize import dequantize, fake_quantize
from qlab.quantization.quantizer import Quantizer, QuantizerState
from qlab.quantization.ranges import encoding_of_range, find_encoding
from qlab.quantization.spec import QuantSpec, Scheme
from qlab.quantization.statistics import Sample, Statistics


class WeightQuantizer(Quantizer):
    """Quantizes one parameter, read as `getattr(owner, attribute)`; `axis` is its output channel axis.

    The range is found from the weight itself, exactly, whenever the weight has changed, unless frozen. `rounding`
    holds integers chosen by a rounding technique in place of rounding to nearest; they count only as long as weight
    and encoding are the ones they were chosen for; afterwards the weight's own grid is found again. `bias_correction`
    [C] is added to the layer's bias while the weight is quantized, so that the float model stays what it was.
    """

    owner: nn.Module
    attribute: str
    bias_correction: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, owner: nn.Module, attribute: str, axis: int = 0) -> None:
        super().__init__(spec, name, axis)
        object.__setattr__(self, "owner", owner)  # not a child: the model owns its module
        self.attribute = attribute
        self.register_buffer("bias_correction", None)
        self._fitted: tuple[int, int] | None = None
        self._rounding: tuple[Tensor, Encoding, tuple[int, int]] | None = None
        self._held_by_rounding = False  # frozen and corrected for the rounding's sake: both go with it
        self._corrected_by_rounding = False
        self._cache: tuple[object, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The float weight."""
        return getattr(self.owner, self.attribute)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the weight as it is now, one histogram a channel."""
        statistics = Statistics(self.axis, histogram_per_channel=True)
        statistics.update(self.weight)
        return statistics

    @property
    def encoding(self) -> Encoding | None:
        """The grid in force; found from the weight when that has changed."""
        self._keep_up()
        return Quantizer.encoding.fget(self)  # type: ignore[attr-defined]

    @encoding.setter
    def encoding(self, encoding: Encoding | None) -> None:
        Quantizer.encoding.fset(self, encoding)  # type: ignore[attr-defined]
        self.__dict__["_fitted"] = self._fingerprint()  # it stays until the weight changes

    @property
    def rounding(self) -> Tensor | None:
        """Integers (int32, shaped as the weight) chosen by a rounding technique, None where rounding is to nearest."""
        return self._rounding[0] if self._rounding is not None and self._rounding_counts() else None

    def set_bias_correction(self, correction: Tensor | None) -> None:
        """Adds `correction` [C] to the layer's bias while the weight is quantized; None takes it away."""
        self.bias_correction = None if correction is None else correction.detach().clone()
        self._corrected_by_rounding = False
        self.version += 1

    @property
    def rounding_is_stale(self) -> bool:
        """Whether a rounding was chosen but weight or encoding have changed since: it is not used any more."""
        return self._rounding is not None and not self._rounding_counts()

    @property
    def is_held_by_rounding(self) -> bool:
        """Whether the encoding is frozen only because a rounding was chosen for it."""
        return self._frozen and self._held_by_rounding

    @property
    def is_corrected_by_rounding(self) -> bool:
        """Whether the bias correction was made for a rounding and goes with it."""
        return self.bias_correction is not None and self._corrected_by_rounding

    def set_rounding(self, codes: Tensor | None, bias_correction: Tensor | None = None) -> None:
        """Uses these integers (shaped as the weight, on the grid) for the weight as it is now; freezes the encoding.

        bias_correction [C]: what the rounding needs added to the layer's bias; it goes when the rounding goes. None
        takes the rounding back, and with it what it froze and corrected.
        """
        encoding = self.required_encoding()
        if codes is None:
            self._let_go()
            self._rounding = None
        else:
            codes = codes.detach().to(torch.int32)
            if codes.shape != self.weight.shape or int(codes.min()) < encoding.qmin or int(codes.max()) > encoding.qmax:
                raise SpecError(
                    f"rounding of {self.name!r} must have shape {tuple(self.weight.shape)} and lie in "
                    f"[{encoding.qmin}, {encoding.qmax}]."
                )
            self._rounding = (in_file(codes) if is_mapped(self.weight) else codes, encoding, self._fingerprint())
            self._held_by_rounding = self._held_by_rounding or not self._frozen
            self._frozen, self._fitted = True, self._fingerprint()
            if bias_correction is not None:
                self.set_bias_correction(bias_correction)
                self._corrected_by_rounding = True
        self._cache = None
        self.version += 1

    def _let_go(self) -> None:
        """Thaws the encoding and drops the bias correction where the rounding was the reason for them."""
        if self._held_by_rounding:
            self._frozen = self._held_by_rounding = False
        if self._corrected_by_rounding:
            self.bias_correction, self._corrected_by_rounding = None, False

    def state(self) -> QuantizerState:
        """A copy of everything the quantizer knows."""
        return replace(
            super().state(),
            fitted=self._fitted == self._fingerprint(),
            codes=self.rounding,
            bias_correction=None if self.bias_correction is None else self.bias_correction.clone(),
            by_rounding=(self._held_by_rounding, self._corrected_by_rounding),
        )

    def set_state(self, state: QuantizerState) -> None:
        """Changes the quantizer to what `state` says of the weight as it is now."""
        super().set_state(state)
        self._fitted = self._fingerprint() if state.fitted else None
        self._cache = self._rounding = None
        if state.codes is not None and state.encoding is not None:
            self._rounding = (state.codes, state.encoding, self._fingerprint())
        self.bias_correction = state.bias_correction
        self._held_by_rounding, self._corrected_by_rounding = state.by_rounding

    def refresh(self) -> None:
        """Finds the encoding again from the weight; a frozen one stays."""
        if self._frozen or not hasattr(self, "owner"):
            return
        self.__dict__["_fitted"] = self._fingerprint()
        weight, spec = self.weight.detach(), self._spec
        try:
            if spec.granularity.kind == "per_tensor" and spec.rule.name == "min_max" and spec.known_range is None:
                found = encoding_of_range(*_ends(weight), spec)  # training asks for it at each step
            elif spec.granularity.kind == "per_tensor":
                found = find_encoding(_sample(weight.reshape(1, -1), spec), spec)
            elif spec.granularity.kind == "per_channel" or weight.dim() < 2:
                rows = weight.movedim(self.axis, 0).reshape(weight.shape[self.axis], -1)
                found = find_encoding(_sample(rows, spec), spec, self.axis)
            else:
                found = self._per_block(weight, spec)
        except NonFiniteData:
            raise SpecError(f"the weight of {self.name!r} holds NaN or infinity; it has no grid.") from None
        # Not by assignment: nn.Module's own way costs more than the range does.
        Quantizer.encoding.fset(self, found if weight.device.type == "cpu" else found.to(weight.device))  # type: ignore[attr-defined]
        let_go(self.weight)
        if self.rounding_is_stale:
            self._let_go()

    def observe(self, x: Tensor) -> None:
        """Nothing to observe: the range comes from the weight."""

    def reset(self) -> None:
        """Nothing to forget: the range comes from the weight."""

    def quantized(self) -> Tensor:
        """The quantized weight, kept until weight, encoding or rounding change; differentiable while training."""
        weight = self.weight
        if not self._enabled:
            return weight
        if torch.is_grad_enabled() and (weight.requires_grad or self.learned is not None):
            return self.differentiable()
        key = self._key()
        if self._cache is not None and self._cache[0] == key:
            return self._cache[1]
        with torch.no_grad():
            codes, encoding = self.rounding, self.required_encoding()
            value = fake_quantize(weight, encoding) if codes is None else dequantize(codes, encoding)
            value = value.to(weight.dtype)
        if is_mapped(weight):  # kept, the quantized weights of all layers would fill the memory that the file saves
            let_go(weight, *([] if codes is None else [codes]))
        else:
            self._cache = (self._key(), value)
        return value

    def differentiable(self) -> Tensor:
        """The quantized weight with a straight-through gradient, computed anew."""
        if self.learned is not None:
            return self.learned.quantize(self.weight)
        encoding = self.required_encoding()
        rounded = fake_quantize(self.weight, encoding)
        codes = self.rounding
        if codes is None:
            return rounded
        return rounded + (dequantize(codes, encoding) - rounded).detach()

    def required_encoding(self) -> Encoding:
        """The encoding; weights always have one."""
        encoding = self.encoding if self.learned is None else self.learned.encoding()
        assert encoding is not None
        return encoding

    def _per_block(self, weight: Tensor, spec: QuantSpec) -> Encoding:
        """One grid a channel and block of `block_size` input channels; scale [C, blocks]."""
        size = spec.granularity.block_size
        assert size is not None
        block_axis = 1 if self.axis == 0 else 0
        ordered = weight.movedim((self.axis, block_axis), (0, 1))
        ordered = ordered.reshape(*ordered.shape[:2], -1)  # [C, K, rest]
        parts = [_sample(part.reshape(len(part), -1), spec) for part in ordered.split(size, dim=1)]
        found = [find_encoding(part, spec, self.axis) for part in parts]
        qmin = min(encoding.qmin for encoding in found)
        if len({encoding.qmin for encoding in found}) > 1:  # unsigned symmetric with one signed block: all signed
            signed = replace(spec, scheme=Scheme.SYMMETRIC)
            found = [find_encoding(part, signed, self.axis) for part in parts]
        scale = torch.stack([encoding.scale for encoding in found], dim=1)
        zero_point = torch.stack([encoding.zero_point for encoding in found], dim=1)
        return Encoding(scale, zero_point, qmin, found[0].qmax, self.axis, size, block_axis)

    def _fingerprint(self) -> tuple[int, int]:
        weight = self.weight
        return weight._version, weight.data_ptr()

    def _key(self) -> object:
        """What the quantized weight depends on."""
        learned = None if self.learned is None else tuple((p._version, p.data_ptr()) for p in self.learned.parameters())
        return self._fingerprint(), self.version, self._fitted, learned

    def _keep_up(self) -> None:
        if self.learned is not None or not hasattr(self, "owner") or self._fitted == self._fingerprint():
            return
        if self.is_held_by_rounding:
            self._let_go()
        if not self._frozen:
            self.refresh()

    def _rounding_counts(self) -> bool:
        assert self._rounding is not None
        _, encoding, fingerprint = self._rounding
        return fingerprint == self._fingerprint() and encoding.equals(Quantizer.encoding.fget(self))  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: fingerprints become 'it is current', because a copied weight has another."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_cache", "_encoding")}
        state["_fitted"] = self._fitted == self._fingerprint()
        state["_rounding"] = self._rounding[:2] if self._rounding is not None and self._rounding_counts() else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a copied state; encoding and rounding stay valid for the copied weight."""
        super().__setstate__({**state, "_cache": None, "_encoding": None})
        self._fitted = self._fingerprint() if state["_fitted"] else None
        if state["_rounding"] is not None:
            self._rounding = (*state["_rounding"], self._fingerprint())


def _ends(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value []; raises NonFiniteData where one is none."""
    low, high = torch.aminmax(weight) if weight.numel() else (weight.new_zeros(()),) * 2
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise NonFiniteData("holds NaN or infinity")
    return low, high


def _sample(rows: Tensor, spec: QuantSpec) -> Sample:
    """What the rule of `spec` needs of rows [C, n]: the range alone for min_max, which training asks at each step."""
    return Sample.of_range(rows) if spec.rule.name == "min_max" else Sample.of_rows(rows.cpu())
