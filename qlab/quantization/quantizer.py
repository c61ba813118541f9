"""Quantizer: spec, statistics and encoding on one activation, as a module whose settings are plain attributes.

Settings may be changed at any time; the encoding follows from the statistics, without data. While ranges are trained
the encoding comes from a `LearnedRange` instead.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import NotCalibrated, SpecError, nearest
from qlab.quantization.encoding import Encoding
from qlab.quantization.fake_quantize import fake_quantize, fake_quantize_
from qlab.quantization.learned_range import LearnedRange
from qlab.quantization.ranges import encoding_of_range, find_encoding
from qlab.quantization.spec import Granularity, QuantSpec, RangeRule, Scheme
from qlab.quantization.statistics import Sample, Statistics

SETTINGS = (*QuantSpec.__dataclass_fields__, "enabled", "frozen")


@dataclass(frozen=True, eq=False)
class QuantizerState:
    """Everything a quantizer knows, to be put back later; tensors are copies.

    fitted: a weight's encoding belongs to the weight as it was. codes: a rounding in force, None where to nearest.
    learned: the range in training, the very module, with its values in `encoding`. by_rounding: whether it is frozen,
    and whether it is corrected, only for the sake of a rounding.
    """

    spec: QuantSpec
    enabled: bool
    frozen: bool
    encoding: Encoding | None
    statistics: Statistics
    fitted: bool = False
    codes: Tensor | None = None
    bias_correction: Tensor | None = None
    learned: LearnedRange | None = None
    by_rounding: tuple[bool, bool] = (False, False)


class Quantizer(nn.Module):
    """Quantizes one activation.

    name: whose output it is, for messages. axis: the channel axis, None where there is none.
    `scale`, `zero_point` and `limits` are buffers (None until an encoding is found), so `state_dict` and `to` work.
    `version` grows with every change that can alter a result; caches compare it.
    """

    name: str
    axis: int | None
    version: int
    scale: Tensor | None
    zero_point: Tensor | None
    limits: Tensor | None
    learned: LearnedRange | None

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
        self.learned = None
        if spec.known_range is not None:
            self.refresh()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what the class declares; raises SpecError for a setting misspelt, which would change nothing."""
        if not name.startswith("_") and name not in _declared(type(self)):  # type: ignore[arg-type]
            raise SpecError(f"a quantizer has no setting {name!r}. {nearest(name, SETTINGS)}")
        super().__setattr__(name, value)

    # Settings ---------------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> QuantSpec:
        """What is asked of this tensor; assign a QuantSpec, or set single fields by name."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantSpec) -> None:
        if spec == self._spec:
            return
        learned, self.learned = self.learned, None
        before, self._spec = self._spec, spec
        try:
            self._frozen = False
            if learned is not None and replace(before, bits=spec.bits) == spec and learned.is_one_range:
                found = learned.encoding().copy()  # in training, other bits divide the range that was learned
                low, high = found.minimum.reshape(-1), found.maximum.reshape(-1)
                self.encoding = encoding_of_range(low, high, spec, found.axis)
            else:
                self.refresh()
        except Exception:
            self._spec, self.learned = before, learned
            raise
        if learned is not None:
            self.learn_range(learned)

    def set(self, **fields: Any) -> None:
        """Changes several settings at once: bits, scheme, granularity, rule, known_range, enabled, frozen."""
        unknown = sorted(set(fields) - set(SETTINGS))
        if unknown:
            raise SpecError(f"{unknown} are not settings of a quantizer; known are {', '.join(SETTINGS)}.")
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
        own = self.__dict__  # a sweep over layers switches thousands of times: spare nn.Module's
        if bool(enabled) != own["_enabled"]:
            own["_enabled"] = bool(enabled)
            own["version"] += 1

    @property
    def frozen(self) -> bool:
        """Whether the encoding stays as it is when new data or a new weight is seen."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        _ = self.encoding  # that of a changed weight is found before it is held
        self._frozen = bool(frozen)

    # Statistics and encoding ------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """What was seen of this tensor."""
        return self._statistics

    @property
    def encoding(self) -> Encoding | None:
        """The grid in force, None before calibration."""
        if self.learned is not None:
            return self.learned.encoding().copy()
        known, buffers = self._encoding, self._buffers  # asked for by every layer of every forward
        scale, zero_point, limits = buffers["scale"], buffers["zero_point"], buffers["limits"]
        if known is not None and known.scale is scale and known.zero_point is zero_point:
            return known
        if scale is None or zero_point is None or limits is None:
            return None
        qmin, qmax = limits.tolist()
        self._encoding = Encoding(scale, zero_point, qmin, qmax, None if scale.dim() == 0 else self.axis, *self._shape)
        return self._encoding

    @encoding.setter
    def encoding(self, encoding: Encoding | None) -> None:
        buffers, own = self._buffers, self.__dict__  # a weight's grid changes at each training step: spare nn.Module's
        own["_encoding"] = None
        if encoding is None:
            buffers["scale"] = buffers["zero_point"] = buffers["limits"] = None
        else:
            scale, limits = buffers["scale"], buffers["limits"]
            device = scale.device if scale is not None else torch.device("cpu")
            buffers["scale"] = encoding.scale.detach().to(device)
            buffers["zero_point"] = encoding.zero_point.detach().to(device)
            if limits is None or limits.tolist() != [encoding.qmin, encoding.qmax]:
                buffers["limits"] = torch.tensor([encoding.qmin, encoding.qmax])
            own["_shape"] = (encoding.block_size, encoding.block_axis)
        own["version"] += 1
        if self.learned is not None and encoding is not None:
            self.learned.set_encoding(encoding)

    def freeze(self, encoding: Encoding | None = None) -> None:
        """Keeps the encoding (or the one given) until a setting is changed by hand."""
        if encoding is not None:
            self.encoding = encoding
        self.frozen = True

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

    def learn_range(self, earlier: LearnedRange | None = None) -> None:
        """Makes the range a parameter that starts from the encoding in force; raises NotCalibrated without one.

        earlier: the range whose parameters to keep, for an optimizer that holds them, where they fit.
        """
        encoding = self.required_encoding()
        self.learned = earlier if earlier is not None and earlier.takes(encoding) else LearnedRange(encoding)
        self.version += 1

    def keep_learned_range(self) -> None:
        """Ends the training of the range: what was learned becomes the frozen encoding."""
        if self.learned is None:
            return
        encoding, self.learned = self.learned.encoding().copy(), None
        self.freeze(encoding)

    def state(self) -> QuantizerState:
        """A copy of everything the quantizer knows."""
        encoding = Quantizer.encoding.fget(self)  # type: ignore[attr-defined]
        copied = None if encoding is None else encoding.copy()
        return QuantizerState(
            self._spec, self._enabled, self._frozen, copied, self._statistics.copy(), learned=self.learned
        )

    def set_state(self, state: QuantizerState) -> None:
        """Changes the quantizer to what `state` says."""
        self._spec, self._enabled, self._frozen = state.spec, state.enabled, state.frozen
        self._statistics = state.statistics.copy()
        self.learned = state.learned
        Quantizer.encoding.fset(self, state.encoding)  # type: ignore[attr-defined]

    # Use --------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, rectifies: bool = False) -> Tensor:
        """`x` rounded to the grid; `x` itself when disabled. Never changes `x`.

        rectifies: `x` stands for relu(x); only for a quantizer at work whose grid begins at zero.
        """
        if not self._enabled:
            return x
        if self.learned is not None and torch.is_grad_enabled():
            return self.learned.quantize(x, rectifies)
        return fake_quantize(x, self.required_encoding(), rectifies)

    def quantize_(self, x: Tensor) -> Tensor:
        """Changes `x`: rounds it to the grid in place, without gradient."""
        return fake_quantize_(x, self.required_encoding()) if self._enabled else x

    def clamps_at(self, limit: float) -> bool:
        """Whether rounding to the grid does what clamping to [0, limit] before it would: there is one grid, 0 is its
        smallest value, and `limit` is rounded to its largest. Where gradients are asked for `limit` is infinite, too.
        """
        if torch.is_grad_enabled():
            if limit < math.inf:
                return False
            if self.learned is not None:
                return self.learned.begins_at_zero
        scalars = self.required_encoding().scalars
        if scalars is None or scalars[1] != 0:
            return False
        scale, _, high = scalars
        return limit / scale >= high - 0.25

    def required_encoding(self) -> Encoding:
        """The encoding; raises NotCalibrated where there is none."""
        encoding = self.encoding if self.learned is None else self.learned.encoding()
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


@cache
def _declared(kind: type) -> frozenset[str]:
    """The attributes that a class and those above it declare."""
    classes = inspect.getmro(kind)
    return frozenset(name for above in classes for name in (*vars(above), *inspect.get_annotations(above)))
