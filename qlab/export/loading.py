"""Encodings from a file into a sim: all of them, or nothing is changed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from qlab.errors import InputError
from qlab.export.encodings_file import EncodingsFile, Entry, read
from qlab.export.grids import limits_of_offset
from qlab.export.matching import Target, match
from qlab.quantization import (
    PER_CHANNEL,
    PER_TENSOR,
    Encoding,
    Quantizer,
    QuantizerState,
    Scheme,
    WeightQuantizer,
    per_block,
)
from qlab.sim import QuantSim, Role

_SHOWN = 20


@dataclass(frozen=True)
class LoadedEncodings:
    """What came of the entries of a file.

    loaded: entry to the layer (or its weight) that has the grid now. derived: entries of int32 biases, whose grid
    follows from input and weight. unmatched: entry to why it has no place in the sim. untouched: quantizers that the
    file says nothing of, as layers or 'layer (weight)'; switched off where `partial` was False.
    """

    version: str
    loaded: dict[str, str]
    derived: tuple[str, ...]
    unmatched: dict[str, str]
    untouched: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"encodings {self.version}: {len(self.loaded)} loaded, {len(self.unmatched)} without a place"]
        lines += [f"  {name!r}: {reason}" for name, reason in list(self.unmatched.items())[:_SHOWN]]
        if len(self.unmatched) > _SHOWN:
            lines.append(f"  and {len(self.unmatched) - _SHOWN:,} more, in .unmatched")
        if self.untouched:
            lines.append(f"  not in the file: {', '.join(self.untouched)}")
        return "\n".join(lines)


def load_encodings(
    sim: QuantSim,
    path: str | os.PathLike[str],
    strict: bool = True,
    partial: bool = True,
    freeze: bool = False,
    names: Mapping[str, str] | None = None,
) -> LoadedEncodings:
    """Changes `sim`: see QuantSim.load_encodings."""
    file = read(path)
    plan = _plan(sim, file, names)
    if strict and plan.unmatched:
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in list(plan.unmatched.items())[:5])
        raise InputError(
            f"{path} has {len(plan.unmatched)} entries without a place in this sim: {shown} Where layers go by other "
            "names, give names={entry: layer}; strict=False leaves such entries out."
        )
    states = {q: _loaded(q, entry, freeze) for q, (entry, _) in plan.chosen.items()}
    untouched = [q for q in sim.quantizers.values() if isinstance(q, Quantizer) and q not in states]
    if not partial:
        states |= {q: replace(q.state(), enabled=False) for q in untouched}
    before = {q: q.state() for q in states}
    try:
        for quantizer, state in states.items():
            quantizer.set_state(state)
    except BaseException:
        for quantizer, state in before.items():
            quantizer.set_state(state)
        raise
    sim.changed()
    described = tuple(str(Target(q.name, "weight" if isinstance(q, WeightQuantizer) else "output")) for q in untouched)
    return LoadedEncodings(file.version, plan.loaded, plan.derived, plan.unmatched, described)


@dataclass(frozen=True)
class _Plan:
    chosen: dict[Quantizer, tuple[Entry, str]]
    loaded: dict[str, str]
    derived: tuple[str, ...]
    unmatched: dict[str, str]


def _plan(sim: QuantSim, file: EncodingsFile, names: Mapping[str, str] | None) -> _Plan:
    """Which entry decides which quantizer: the layer's own before that of a layer which inherits its grid."""
    matched = match(sim, file, names)
    unmatched, derived, loaded = dict(matched.unmatched), [], {}
    own: dict[Quantizer, tuple[Entry, str]] = {}
    others: list[tuple[Quantizer, Entry, str]] = []
    for entry in file.entries:
        target = matched.targets.get(entry.label)
        if target is None:
            continue
        placed = sim.placed[target.layer]
        if target.part == "bias":
            derived.append(entry.label)
        elif target.part == "weight" and placed.weight is not None:
            own[placed.weight] = (entry, entry.label)
            loaded[entry.label] = str(target)
        elif placed.output is None or placed.role is Role.FUSED:
            reason = placed.reason or placed.role.value
            unmatched[entry.label] = f"{target.layer!r} has no grid of its own here ({reason})."
        elif placed.role is Role.QUANTIZED and placed.output not in own:
            own[placed.output] = (entry, entry.label)
            loaded[entry.label] = str(target)
        else:
            others.append((placed.output, entry, target.layer))
    for quantizer, entry, layer in others:
        deciding = own.setdefault(quantizer, (entry, entry.label))
        if same_grid(deciding[0], entry):
            loaded[entry.label] = layer
        else:
            unmatched[entry.label] = (
                f"{layer!r} lies on the grid of {quantizer.name!r} here, for which {deciding[1]!r} gives another one."
            )
    return _Plan(own, loaded, tuple(derived), unmatched)


def same_grid(a: Entry, b: Entry) -> bool:
    """Whether two entries tell of one grid."""
    if a.scale is None or b.scale is None or a.offset is None or b.offset is None:
        return a.bits == b.bits
    return a.bits == b.bits and torch.equal(a.scale, b.scale) and torch.equal(a.offset, b.offset)


def _loaded(quantizer: Quantizer, entry: Entry, freeze: bool) -> QuantizerState:
    """The state that the entry asks of the quantizer."""
    state = quantizer.state()
    if entry.bits is None:
        return replace(state, enabled=False)
    encoding, scheme = encoding_of(entry, quantizer)
    granularity = PER_TENSOR if encoding.axis is None else PER_CHANNEL
    if encoding.block_size is not None:
        granularity = per_block(encoding.block_size)
    spec = replace(state.spec, bits=entry.bits, scheme=scheme, granularity=granularity)
    unchanged = encoding.equals(state.encoding)
    if not unchanged:
        spec = replace(spec, known_range=None)
    codes = state.codes if unchanged else None
    return replace(
        state, spec=spec, enabled=True, frozen=freeze, encoding=encoding, fitted=True, codes=codes, learned=None
    )


def encoding_of(entry: Entry, quantizer: Quantizer) -> tuple[Encoding, Scheme]:
    """The entry's grid on the tensor of `quantizer`, and its scheme; raises InputError where it does not fit."""
    assert entry.bits is not None and entry.scale is not None and entry.offset is not None  # noqa: PT018
    if entry.bits == 32:
        raise InputError(f"{entry.label!r} has 32 bits; the output of a layer and a weight have 2 to 16.")
    offset = entry.offset.reshape(-1)
    qmin, qmax, scheme = _grid(entry, offset, quantizer.scheme)
    zero_point = qmin - entry.offset
    if scheme is not Scheme.ASYMMETRIC:
        zero_point = torch.zeros_like(entry.offset)
    if bool(((zero_point < qmin) | (zero_point > qmax)).any()):
        raise InputError(f"{entry.label!r} has an offset outside {entry.bits} bits.")
    scale = entry.scale
    if entry.block_size is not None:
        return _blocks(entry, quantizer, scale, zero_point, qmin, qmax), scheme
    shape = tuple(quantizer.weight.shape) if isinstance(quantizer, WeightQuantizer) else None
    axis = quantizer.axis if quantizer.axis is not None else 0
    if scale.dim() == 0 and shape is not None and quantizer.granularity == PER_CHANNEL and shape[axis] == 1:
        scale, zero_point = (
            scale.reshape(1),
            zero_point.reshape(1),
        )  # one channel, which a file cannot tell from one grid
    if scale.dim() == 0:
        return Encoding(scale, zero_point, qmin, qmax), scheme
    channels = shape[axis] if shape is not None else None
    if scale.dim() > 1 or quantizer.axis is None or (channels is not None and len(scale) != channels):
        expected = f"{channels} channels" if channels is not None else "channels"
        raise InputError(f"{entry.label!r} has scales of shape {list(scale.shape)}; the tensor has {expected}.")
    rank = len(shape) if shape is not None else None
    if entry.axis is not None and rank is not None and entry.axis % rank != quantizer.axis % rank:
        raise InputError(f"{entry.label!r} has axis {entry.axis}; qlab keeps its channels on axis {quantizer.axis}.")
    return Encoding(scale, zero_point, qmin, qmax, quantizer.axis), scheme


def _grid(entry: Entry, offset: torch.Tensor, asked: Scheme) -> tuple[int, int, Scheme]:
    """(qmin, qmax, scheme); a scheme that the file cannot tell from another stays as asked of the quantizer."""
    assert entry.bits is not None
    if entry.symmetric is False:
        return *limits_of_offset(entry.bits, False, 0), Scheme.ASYMMETRIC
    if len(offset.unique()) != 1:
        raise InputError(f"{entry.label!r} is symmetric and has several offsets.")
    qmin, qmax = limits_of_offset(entry.bits, True, int(offset[0]))
    if qmin == 0:
        unsigned = entry.symmetric is True or asked is Scheme.UNSIGNED_SYMMETRIC
        return qmin, qmax, Scheme.UNSIGNED_SYMMETRIC if unsigned else Scheme.ASYMMETRIC
    if qmin == -qmax or (entry.symmetric is None and asked is Scheme.STRICT_SYMMETRIC):
        return -qmax, qmax, Scheme.STRICT_SYMMETRIC
    return qmin, qmax, Scheme.UNSIGNED_SYMMETRIC if asked is Scheme.UNSIGNED_SYMMETRIC else Scheme.SYMMETRIC


def _blocks(
    entry: Entry, quantizer: Quantizer, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> Encoding:
    assert entry.block_size is not None
    if not isinstance(quantizer, WeightQuantizer) or quantizer.weight.dim() < 2:
        raise InputError(f"{entry.label!r} has blocks; they are for weights.")
    shape, axis = tuple(quantizer.weight.shape), quantizer.axis % quantizer.weight.dim()
    block_axis = 1 if axis == 0 else 0
    if entry.axis is not None and entry.axis % len(shape) != block_axis:
        raise InputError(f"{entry.label!r} has blocks along axis {entry.axis}; qlab's lie along axis {block_axis}.")
    blocks = -(-shape[block_axis] // entry.block_size)
    if scale.numel() != shape[axis] * blocks:
        raise InputError(
            f"{entry.label!r} has {scale.numel()} scales; {shape[axis]} channels with {blocks} blocks of "
            f"{entry.block_size} have {shape[axis] * blocks}."
        )

    def by_channel(values: torch.Tensor) -> torch.Tensor:
        if axis < block_axis:
            return values.reshape(shape[axis], blocks)
        return values.reshape(blocks, shape[axis]).t().contiguous()

    return Encoding(by_channel(scale), by_channel(zero_point), qmin, qmax, axis, entry.block_size, block_axis)
