"""Quantizers: spec, statistics and encoding on one tensor, as modules whose settings are plain attributes.

`Quantizer` works on activations and learns its range from data that passes `observe`. `WeightQuantizer` belongs to a
parameter: it reads its range from the weight itself and keeps the quantized weight until weight or encoding change.
Settings may be changed at any time; the encoding follows from the statistics, without data.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import NotCalibrated, SpecError
from qlab.quantization.encoding import Encoding
from qlab.quantization.fake_quantize import dequantize, fake_quantize, fake_quantize_
from qlab.quantization.ranges import encoding_of_range, find_encoding
from qlab.quantization.spec import Granularity, QuantSpec, RangeRule, Scheme
from qlab.quantization.statistics import Sample, Statistics


@dataclass(frozen=True, eq=False)
class QuantizerState:
    """Everything a quantizer knows, to be put back later; tensors are copies.

    fitted: a weight's encoding belongs to the weight as it was. codes: a rounding in force, None where to nearest.
    """

    spec: QuantSpec
    enabled: bool
    frozen: bool
    encoding: Encoding | None
    statistics: Statistics
    fitted: bool = False
    codes: Tensor | None = None
    bias_correction: Tensor | None = None


class Quantizer(nn.Module):
    """Quantizes one activation.

    name: whose output it is, for messages. axis: the channel axis, None where there is none.
    `scale`, `zero_point` and `limits` are buffers (None until an encoding is found), so `state_dict` and `to` work.
    `version` grows with every change that can alter a result; caches compare it.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    limits: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, axis: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.axis = axis
        self.version = 0
        self._spec = spec
        self._enabled = True
        self._frozen = False
        self._statistics = Statistics(axis, spec.granularity.kind != "per_tensor")
        self._shape: tuple[int | None, int] = (None, 1)  # (block size, block axis) of the encoding
        self._encoding: Encoding | None = None
        for buffer in ("scale", "zero_point", "limits"):
            self.register_buffer(buffer, None)
        if spec.known_range is not None:
            self.refresh()

    # Settings ---------------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> QuantSpec:
        """What is asked of this tensor; assign a QuantSpec, or set single fields by name."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantSpec) -> None:
        if spec == self._spec:
            return
        before, self._spec = self._spec, spec
        try:
            self._frozen = False
            self.refresh()
        except Exception:
            self._spec = before
            raise

    def set(self, **fields: Any) -> None:
        """Changes several settings at once: bits, scheme, granularity, rule, known_range, enabled, frozen."""
        unknown = set(fields) - {*QuantSpec.__dataclass_fields__, "enabled", "frozen"}
        if unknown:
            raise SpecError(
                f"{sorted(unknown)} are not settings of a quantizer; known are bits, scheme, granularity, rule, "
                "known_range, enabled, frozen."
            )
        asked = {key: fields.pop(key) for key in tuple(fields) if key in QuantSpec.__dataclass_fields__}
        self.spec = replace(self._spec, **asked)
        for key, value in fields.items():
            setattr(self, key, value)

    @property
    def bits(self) -> int:
        """Bits of the integer grid, 2 to 16."""
        return self._spec.bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self.spec = replace(self._spec, bits=bits)

    @property
    def scheme(self) -> Scheme:
        """How the grid lies around zero; a Scheme or its name."""
        return self._spec.scheme

    @scheme.setter
    def scheme(self, scheme: Scheme | str) -> None:
        self.spec = replace(self._spec, scheme=Scheme.of(scheme))

    @property
    def granularity(self) -> Granularity:
        """One grid per tensor, per channel or per block; a Granularity or its name."""
        return self._spec.granularity

    @granularity.setter
    def granularity(self, granularity: Granularity | str) -> None:
        self.spec = replace(self._spec, granularity=Granularity.of(granularity))

    @property
    def rule(self) -> RangeRule:
        """How the range is chosen from the statistics; a RangeRule or its name."""
        return self._spec.rule

    @rule.setter
    def rule(self, rule: RangeRule | str) -> None:
        self.spec = replace(self._spec, rule=RangeRule.of(rule))

    @property
    def enabled(self) -> bool:
        """Whether this tensor is quantized; when False it stays float."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if bool(enabled) != self._enabled:
            self._enabled = bool(enabled)
            self.version += 1

    @property
    def frozen(self) -> bool:
        """Whether the encoding stays as it is when new data or a new weight is seen."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = bool(frozen)

    # Statistics and encoding ------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """What was seen of this tensor."""
        return self._statistics

    @property
    def encoding(self) -> Encoding | None:
        """The grid in force, None before calibration."""
        if self.scale is None or self.zero_point is None or self.limits is None:
            return None
        known = self._encoding
        if known is None or known.scale is not self.scale or known.zero_point is not self.zero_point:
            qmin, qmax = self.limits.tolist()
            axis = None if self.scale.dim() == 0 else self.axis
            self._encoding = Encoding(self.scale, self.zero_point, qmin, qmax, axis, *self._shape)
        return self._encoding

    @encoding.setter
    def encoding(self, encoding: Encoding | None) -> None:
        device = self.scale.device if self.scale is not None else torch.device("cpu")
        if encoding is None:
            self.scale = self.zero_point = self.limits = None
        else:
            self.scale, self.zero_point = encoding.scale.detach().to(device), encoding.zero_point.detach().to(device)
            self.limits = torch.tensor([encoding.qmin, encoding.qmax])
            self._shape = (encoding.block_size, encoding.block_axis)
        self._encoding = None
        self.version += 1

    def freeze(self, encoding: Encoding | None = None) -> None:
        """Keeps the encoding (or the one given) until a setting is changed by hand."""
        if encoding is not None:
            self.encoding = encoding
        self._frozen = True

    def set_range(self, low: float | Tensor, high: float | Tensor) -> None:
        """Sets and freezes the grid that covers [low, high]: numbers per tensor, tensors [C] per channel."""
        low_, high_ = (torch.as_tensor(bound, dtype=torch.float32).reshape(-1) for bound in (low, high))
        axis = self.axis if low_.numel() > 1 else None
        self.freeze(encoding_of_range(low_, high_, self._spec, axis))

    def reset(self) -> None:
        """Forgets statistics and encoding, before a new calibration; frozen quantizers keep their encoding."""
        self._statistics = Statistics(self.axis, self._spec.granularity.kind != "per_tensor")
        if not self._frozen and self._spec.known_range is None:
            self.encoding = None

    def observe(self, x: Tensor) -> None:
        """Adds `x` to the statistics. Raises NonFiniteData on NaN or infinity."""
        self._statistics.update(x)

    def refresh(self) -> None:
        """Finds the encoding again from the statistics; a frozen one stays."""
        if self._frozen:
            return
        if self._spec.granularity.kind == "per_block":
            raise SpecError(f"the output of {self.name!r} cannot be quantized per block: blocks are for weights.")
        if self._spec.known_range is not None:
            ones = torch.ones(1, 1)
            self.encoding = find_encoding(Sample(-ones[0], ones[0], ones, ones, 0 * ones[0]), self._spec)
            return
        if self._statistics.is_empty:
            self.encoding = None
            return
        per_channel = self._spec.granularity.kind == "per_channel"
        if per_channel and self._statistics.axis is None:
            raise SpecError(f"the output of {self.name!r} has no channel axis; its granularity is 'per_tensor'.")
        sample = self._statistics.sample(per_channel)
        low, high = self._statistics.minimum, self._statistics.maximum
        if per_channel and low is not None and high is not None and len(self._statistics.counts) != len(low):
            if self._spec.rule.name != "min_max":
                raise NotCalibrated(
                    f"{self.name!r} has no histogram per channel: it was calibrated per tensor. Use rule 'min_max', or "
                    "set the granularity first and run sim.calibrate(batches)."
                )
            self.encoding = encoding_of_range(low, high, self._spec, self._statistics.axis)
            return
        self.encoding = find_encoding(sample, self._spec, self._statistics.axis if per_channel else None)

    def state(self) -> QuantizerState:
        """A copy of everything the quantizer knows."""
        encoding = Quantizer.encoding.fget(self)  # type: ignore[attr-defined]
        copied = None if encoding is None else encoding.copy()
        return QuantizerState(self._spec, self._enabled, self._frozen, copied, self._statistics.copy())

    def set_state(self, state: QuantizerState) -> None:
        """Changes the quantizer to what `state` says."""
        self._spec, self._enabled, self._frozen = state.spec, state.enabled, state.frozen
        self._statistics = state.statistics.copy()
        Quantizer.encoding.fset(self, state.encoding)  # type: ignore[attr-defined]

    # Use --------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid; `x` itself when disabled. Never changes `x`."""
        return fake_quantize(x, self.required_encoding()) if self._enabled else x

    def quantize_(self, x: Tensor) -> Tensor:
        """Changes `x`: rounds it to the grid in place, without gradient."""
        return fake_quantize_(x, self.required_encoding()) if self._enabled else x

    def required_encoding(self) -> Encoding:
        """The encoding; raises NotCalibrated where there is none."""
        encoding = self.encoding
        if encoding is None:
            raise NotCalibrated(
                f"layer {self.name!r} has no output encoding: it saw no data. Run sim.calibrate(batches) with at least "
                "one batch that reaches it."
            )
        return encoding

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        grid = {name: getattr(self, name) for name in ("scale", "zero_point")}
        super()._apply(fn, recurse)
        for name, before in grid.items():  # model.half() must not round the grid
            value = getattr(self, name)
            if value is not None and value.dtype != before.dtype:
                setattr(self, name, before.to(value.device))
        self._encoding = None
        self.version += 1
        return self

    def adopt(self, statistics: Statistics) -> None:
        """Takes statistics gathered elsewhere in place of its own and finds the encoding; a frozen one stays."""
        before, self._statistics = self._statistics, statistics
        try:
            self.refresh()
        except Exception:
            self._statistics = before
            raise

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            if value is not None and (getattr(self, name) is None or getattr(self, name).shape != value.shape):
                setattr(self, name, value.detach().clone())
            elif value is None:
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._encoding = None
        self.version += 1

    def __repr__(self) -> str:
        state = repr(self.encoding) if self.encoding is not None else "not calibrated"
        flags = ("" if self._enabled else ", off") + (", frozen" if self._frozen else "")
        return f"{type(self).__name__}({self.name!r}: {self._spec}{flags}, {state})"


class WeightQuantizer(Quantizer):
    """Quantizes one parameter, read as `getattr(owner, attribute)`; `axis` is its output channel axis.

    The range is found from the weight itself, exactly, whenever the weight has changed, unless frozen. `rounding`
    holds integers chosen by a rounding technique in place of rounding to nearest; they count only as long as weight
    and encoding are the ones they were chosen for. `bias_correction` [C] is added to the layer's bias while the weight
    is quantized, so that the float model stays what it was.
    """

    bias_correction: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, owner: nn.Module, attribute: str, axis: int = 0) -> None:
        super().__init__(spec, name, axis)
        object.__setattr__(self, "owner", owner)  # not a child: the model owns its module
        self.attribute = attribute
        self.register_buffer("bias_correction", None)
        self._fitted: tuple[int, int] | None = None
        self._rounding: tuple[Tensor, Encoding, tuple[int, int]] | None = None
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

    @property
    def rounding(self) -> Tensor | None:
        """Integers (int32, shaped as the weight) chosen by a rounding technique, None where rounding is to nearest."""
        return self._rounding[0] if self._rounding is not None and self._rounding_counts() else None

    def set_bias_correction(self, correction: Tensor | None) -> None:
        """Adds `correction` [C] to the layer's bias while the weight is quantized; None takes it away."""
        self.bias_correction = None if correction is None else correction.detach().clone()
        self.version += 1

    @property
    def rounding_is_stale(self) -> bool:
        """Whether a rounding was chosen but weight or encoding have changed since: it is not used any more."""
        return self._rounding is not None and not self._rounding_counts()

    def set_rounding(self, codes: Tensor | None) -> None:
        """Uses these integers (shaped as the weight, on the grid) for the weight as it is now; freezes the encoding."""
        encoding = self.required_encoding()
        if codes is None:
            self._rounding = None
        else:
            codes = codes.detach().to(torch.int32)
            if codes.shape != self.weight.shape or int(codes.min()) < encoding.qmin or int(codes.max()) > encoding.qmax:
                raise SpecError(
                    f"rounding of {self.name!r} must have shape {tuple(self.weight.shape)} and lie in "
                    f"[{encoding.qmin}, {encoding.qmax}]."
                )
            self._rounding = (codes, encoding, self._fingerprint())
            self._frozen = True
        self._cache = None
        self.version += 1

    def state(self) -> QuantizerState:
        """A copy of everything the quantizer knows."""
        return replace(
            super().state(),
            fitted=self._fitted == self._fingerprint(),
            codes=self.rounding,
            bias_correction=None if self.bias_correction is None else self.bias_correction.clone(),
        )

    def set_state(self, state: QuantizerState) -> None:
        """Changes the quantizer to what `state` says of the weight as it is now."""
        super().set_state(state)
        self._fitted = self._fingerprint() if state.fitted else None
        self._cache = self._rounding = None
        if state.codes is not None and state.encoding is not None:
            self._rounding = (state.codes, state.encoding, self._fingerprint())
        self.bias_correction = state.bias_correction

    def refresh(self) -> None:
        """Finds the encoding again from the weight; a frozen one stays."""
        if self._frozen or not hasattr(self, "owner"):
            return
        self._fitted = self._fingerprint()
        weight, spec = self.weight.detach(), self._spec
        if not bool(torch.isfinite(weight).all()):
            raise SpecError(f"the weight of {self.name!r} holds NaN or infinity; it has no grid.")
        rows = weight.cpu().movedim(self.axis, 0).reshape(weight.shape[self.axis], -1)
        if spec.granularity.kind == "per_tensor":
            found = find_encoding(Sample.of_rows(rows.reshape(1, -1)), spec)
        elif spec.granularity.kind == "per_channel" or weight.dim() < 2:
            found = find_encoding(Sample.of_rows(rows), spec, self.axis)
        else:
            found = self._per_block(weight, spec)
        self.encoding = found.to(weight.device)

    def observe(self, x: Tensor) -> None:
        """Nothing to observe: the range comes from the weight."""

    def reset(self) -> None:
        """Nothing to forget: the range comes from the weight."""

    def quantized(self) -> Tensor:
        """The quantized weight, kept until weight, encoding or rounding change; differentiable while training."""
        weight = self.weight
        if not self._enabled:
            return weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return self.differentiable()
        key = (self._fingerprint(), self.version, self._fitted)
        if self._cache is None or self._cache[0] != key:
            with torch.no_grad():
                codes, encoding = self.rounding, self.required_encoding()
                value = fake_quantize(weight, encoding) if codes is None else dequantize(codes, encoding)
            key = (self._fingerprint(), self.version, self._fitted)
            self._cache = (key, value.to(weight.dtype))
        return self._cache[1]

    def differentiable(self) -> Tensor:
        """The quantized weight with a straight-through gradient, computed anew."""
        encoding = self.required_encoding()
        rounded = fake_quantize(self.weight, encoding)
        codes = self.rounding
        if codes is None:
            return rounded
        return rounded + (dequantize(codes, encoding) - rounded).detach()

    def required_encoding(self) -> Encoding:
        """The encoding; weights always have one."""
        encoding = self.encoding
        assert encoding is not None
        return encoding

    def _per_block(self, weight: Tensor, spec: QuantSpec) -> Encoding:
        """One grid a channel and block of `block_size` input channels; scale [C, blocks]."""
        size = spec.granularity.block_size
        assert size is not None
        block_axis = 1 if self.axis == 0 else 0
        ordered = weight.cpu().movedim((self.axis, block_axis), (0, 1))
        ordered = ordered.reshape(*ordered.shape[:2], -1)  # [C, K, rest]
        parts = [Sample.of_rows(part.reshape(len(part), -1)) for part in ordered.split(size, dim=1)]
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

    def _keep_up(self) -> None:
        if not self._frozen and hasattr(self, "owner") and self._fitted != self._fingerprint():
            self.refresh()

    def _rounding_counts(self) -> bool:
        assert self._rounding is not None
        _, encoding, fingerprint = self._rounding
        return fingerprint == self._fingerprint() and encoding.equals(Quantizer.encoding.fget(self))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightQuantizer":
        """A copy whose fingerprints are those of the copied weight, so that encoding and rounding stay valid."""
        current = self._fitted == self._fingerprint()
        counts = self._rounding is not None and self._rounding_counts()
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            if key not in ("_cache", "_encoding", "_rounding"):
                twin.__dict__[key] = deepcopy(value, memo)
        twin.__dict__.update(_cache=None, _encoding=None, _rounding=None)
        if current:
            twin._fitted = twin._fingerprint()
        if counts and self._rounding is not None:
            twin._rounding = (self._rounding[0].clone(), self._rounding[1], twin._fingerprint())
        return twin
