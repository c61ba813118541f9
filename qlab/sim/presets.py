"""Presets: what a target asks of a model, as plain values. Edit one with `dataclasses.replace`, or write your own."""

import os
from dataclasses import dataclass, field, replace

from qlab.errors import SpecError
from qlab.quantization import PER_CHANNEL, PER_TENSOR, QuantSpec, Scheme

SUPERGROUPS: tuple[tuple[str, ...], ...] = tuple(
    (*head, *norm, activation)
    for head in (("conv",), ("depthwise_conv",), ("conv_transpose",), ("linear",))
    for norm in ((), ("batch_norm",))
    for activation in ("relu", "relu6", "clip", "prelu", "leaky_relu")
) + (
    ("conv", "batch_norm"),
    ("depthwise_conv", "batch_norm"),
    ("conv_transpose", "batch_norm"),
    ("linear", "batch_norm"),
    ("add", "relu"),
    ("add", "relu6"),
    ("add", "clip"),
)
"""Sequences of kinds that a target computes as one: only the last output is quantized."""


@dataclass(frozen=True)
class Preset:
    """The placement rules and default specs of one target.

    name: shown to the person. weight, output: specs for weights and activations. skip: globs of layer names that stay
    float. supergroups: sequences of kinds that share the last one's output quantizer. kinds: overrides for a kind, as
    (kind, 'weight' or 'output', spec or None for float); the first that fits counts, and the kind '*' is any.
    share_cat: inputs of a concatenation share one grid. quantize_inputs, quantize_outputs: whether those of the model
    are quantized. int32_bias: layers are computed as integer kernels do, with biases rounded to int32 (scale input *
    weight) and exact sums. advice: what a person should know of the preset.
    """

    name: str
    weight: QuantSpec
    output: QuantSpec
    skip: tuple[str, ...] = ()
    supergroups: tuple[tuple[str, ...], ...] = SUPERGROUPS
    kinds: tuple[tuple[str, str, QuantSpec | None], ...] = ()
    share_cat: bool = True
    quantize_inputs: bool = True
    quantize_outputs: bool = True
    int32_bias: bool = False
    advice: str = field(default="", compare=False)


def w8a8(
    per_channel: bool = False,
    symmetric: bool | None = None,
    skip: tuple[str, ...] | list[str] = (),
    rule: str = "min_max",
    int32_bias: bool = False,
) -> Preset:
    """8-bit weights and activations: what integer accelerators run at full speed.

    per_channel: one weight scale for each output channel. symmetric: None gives symmetric weights and asymmetric
    activations (the common case), True both symmetric, False both asymmetric. skip: globs of layers left in float.
    rule: how activation ranges are chosen.
    """
    return _preset("w8a8", 8, 8, per_channel, symmetric, skip, rule, int32_bias)


def w4a8(
    per_channel: bool = False,
    symmetric: bool | None = None,
    skip: tuple[str, ...] | list[str] = (),
    rule: str = "min_max",
    int32_bias: bool = False,
) -> Preset:
    """4-bit weights and 8-bit activations; arguments as in `w8a8`."""
    return _preset("w4a8", 4, 8, per_channel, symmetric, skip, rule, int32_bias)


def w8a16(
    per_channel: bool = False,
    symmetric: bool | None = None,
    skip: tuple[str, ...] | list[str] = (),
    rule: str = "min_max",
    int32_bias: bool = False,
) -> Preset:
    """8-bit weights and 16-bit activations, for models with wide activations; arguments as in `w8a8`."""
    return _preset("w8a16", 8, 16, per_channel, symmetric, skip, rule, int32_bias)


def w4a4(
    per_channel: bool = False,
    symmetric: bool | None = None,
    skip: tuple[str, ...] | list[str] = (),
    rule: str = "sqnr",
    int32_bias: bool = False,
) -> Preset:
    """4-bit weights and activations; arguments as in `w8a8`. Ranges are clipped by default: at 4 bits it pays."""
    return _preset("w4a4", 4, 4, per_channel, symmetric, skip, rule, int32_bias)


def onnxruntime(
    per_channel: bool = False,
    symmetric: bool | None = None,
    skip: tuple[str, ...] | list[str] = (),
    rule: str = "min_max",
) -> Preset:
    """8-bit weights and activations as ONNX Runtime's integer kernels compute them; arguments as in `w8a8`.

    Biases are int32, sums of integers are exact and rounded once. Softmax lies on steps of 1/256 (1/128 on a signed
    grid): its kernel multiplies by the largest whole number in 1 / scale, which for 1/255 in float32 is 254.
    """
    preset = _preset("onnxruntime", 8, 8, per_channel, symmetric, skip, rule, int32_bias=True)
    highest = preset.output.limits()[1]
    softmax = replace(preset.output, known_range=(0.0, highest / (highest + 1)))
    return replace(preset, kinds=(("softmax", "output", softmax),))


def from_aimet(
    path: str | os.PathLike[str], output_bits: int = 8, weight_bits: int = 8, rule: str = "min_max"
) -> Preset:
    """The placement rules of an AIMET configuration file (JSON). Raises InputError, saying where, if it is not one.

    output_bits, weight_bits, rule: what AIMET is given beside the file. Strict and unsigned symmetric grids are taken
    over too. `advice` of the result names the settings that have no counterpart here.
    """
    from qlab.sim.aimet_config import preset_of_config

    return preset_of_config(path, output_bits, weight_bits, rule)


def checked(preset: Preset | None) -> Preset:
    """The preset, 8 bits where there is none; raises SpecError for anything else."""
    if not isinstance(preset, Preset | None):
        raise SpecError(f"preset must be a Preset such as qlab.presets.w8a8(); got {preset!r}.")
    return preset or w8a8()


def _preset(
    name: str,
    weight_bits: int,
    output_bits: int,
    per_channel: bool,
    symmetric: bool | None,
    skip: tuple[str, ...] | list[str],
    rule: str,
    int32_bias: bool,
) -> Preset:
    weight_scheme = Scheme.ASYMMETRIC if symmetric is False else Scheme.SYMMETRIC
    output_scheme = Scheme.SYMMETRIC if symmetric is True else Scheme.ASYMMETRIC
    granularity = PER_CHANNEL if per_channel else PER_TENSOR
    return Preset(
        name,
        QuantSpec(weight_bits, weight_scheme, granularity),
        QuantSpec(output_bits, output_scheme, rule=rule),  # type: ignore[arg-type]
        (skip,) if isinstance(skip, str) else tuple(skip),
        int32_bias=int32_bias,
    )
