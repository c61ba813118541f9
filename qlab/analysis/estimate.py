"""What quantizing each tensor would cost, estimated for every layer, width and granularity from one pass over data.

To second order a small change of one tensor costs KL = 1/2 E[(g . d)^2], where d is the change that it makes in a
layer's output and g a gradient whose covariance is the curvature of the KL at the model's own result. d is computed:
the layer run with dW as its weight, or the rounding error of an output. (If g and the layer's input were independent of
each other and from position to position, a weight's term would be 1/2 tr(Gamma dW G dW^T). They are not, and that form
ranks layers less well.) A second gradient, of the squared error of the result, estimates the SQNR.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call

from qlab.analysis.bits import Bits
from qlab.analysis.divergence import class_axis
from qlab.analysis.precision import jackknife
from qlab.analysis.shadow import quantizers_of, set_bits, shadow
from qlab.graph import Layer, call_layer
from qlab.progress import Progress, Silent
from qlab.quantization import PER_CHANNEL, PER_TENSOR, Encoding, Quantizer, WeightQuantizer, fake_quantize
from qlab.sim import QuantSim, Role
from qlab.sim.evaluate import float_tensors

ESTIMATE_COLUMNS = ("layer", "part", "bits", "granularity", "is_set", "kl", "kl_error", "sqnr", "sqnr_error", "mse")


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A grid to try on one quantizer; encoding None stands for the quantizer as it is set, rounding and all."""

    bits: int
    granularity: str
    encoding: Encoding | None


@dataclass(frozen=True, eq=False)
class _Site:
    """A layer's output where a quantizer makes itself felt."""

    layer: Layer
    quantizer: Quantizer
    candidates: list[_Candidate]


def estimate_sensitivity(
    sim: QuantSim,
    batches: Sequence[Any],
    bits: Sequence[int] = (4, 8),
    probes: int = 1,
    max_bytes: int = 1 << 30,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row for each tensor, width and granularity, and one (`is_set`) for each tensor as it is set now.

    Columns: layer, part, bits, granularity, is_set, kl [nats a prediction], sqnr [dB] and mse of the model's result if
    this tensor alone were quantized so, with standard errors over samples. probes: random directions a batch; each is
    two backward passes. `sim` is not changed.
    """
    twin = shadow(sim)
    sites = _sites(twin, bits)
    sums: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    results: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(batches):
        (progress or Silent()).step(number, len(batches), f"estimate, batch {number}")
        for flat in _parts(twin, twin.inputs(batch), max_bytes):
            _add(twin, flat, sites, sums, results, probes, generator)
    return pd.DataFrame(list(_rows(sites, sums, torch.cat(results))), columns=list(ESTIMATE_COLUMNS))


def estimate_of(table: pd.DataFrame, layers: Sequence[tuple[str, str]], bits: Bits) -> tuple[float, float]:
    """(kl, mse) of several tensors (layer, part) quantized together: the sum of theirs, at their own granularity."""
    kl = mse = 0.0
    for layer, part in layers:
        rows = table[(table.layer == layer) & (table.part == part)]
        own = rows[rows.is_set]
        width = bits.weight if part == "weight" else bits.output
        if width is not None and len(own) and width != own.bits.iloc[0]:
            own = rows[~rows.is_set & (rows.bits == width) & (rows.granularity == own.granularity.iloc[0])]
        kl, mse = kl + (own.kl.iloc[0] if len(own) else math.nan), mse + (own.mse.iloc[0] if len(own) else math.nan)
    return kl, mse


def _sites(sim: QuantSim, bits: Sequence[int]) -> list[_Site]:
    candidates = {id(q): list(_candidates(q, bits)) for q in quantizers_of(sim) if q.encoding is not None}
    found = []
    for layer in sim.graph:
        entry = sim.placed[layer.name]
        if entry.weight is not None and not entry.carries_weight:
            found.append(_Site(layer, entry.weight, candidates[id(entry.weight)]))
        if entry.role is Role.QUANTIZED and entry.output is not None and id(entry.output) in candidates:
            found.append(_Site(layer, entry.output, candidates[id(entry.output)]))
    return found


def _candidates(quantizer: Quantizer, bits: Sequence[int]) -> Iterator[_Candidate]:
    """What to try on a quantizer of a shadow, which is left as it was found."""
    state, spec = quantizer.state(), quantizer.spec
    yield _Candidate(spec.bits, str(spec.granularity), None)
    is_weight = isinstance(quantizer, WeightQuantizer)
    for width in bits:
        for granularity in dict.fromkeys((spec.granularity, *((PER_TENSOR, PER_CHANNEL) if is_weight else ()))):
            if granularity == spec.granularity and width == spec.bits:
                continue  # as it is set
            if granularity != spec.granularity:
                quantizer.spec = replace(spec, bits=width, granularity=granularity)
            else:
                set_bits(quantizer, width)
            yield _Candidate(width, str(granularity), quantizer.encoding)
            quantizer.set_state(state)


def _parts(sim: QuantSim, flat: list[Any], max_bytes: int) -> Iterator[list[Any]]:
    """The inputs of a batch, cut so that values and gradients of a part fit the budget."""
    numbers = sum(math.prod(d or 1 for d in layer.shape[1:]) for layer in sim.graph if layer.is_float and layer.shape)
    size = max(max_bytes // (12 * max(numbers, 1)), 1)
    tensors = [value for value in flat if isinstance(value, Tensor)]
    samples = {value.shape[0] if value.dim() else 0 for value in tensors}
    if len(samples) != 1 or (total := samples.pop()) <= size:
        yield flat
        return
    for start in range(0, total, size):
        yield [value[start : start + size] if isinstance(value, Tensor) else value for value in flat]


def _add(
    sim: QuantSim,
    flat: list[Any],
    sites: list[_Site],
    sums: dict[tuple[int, int], list[Tensor]],
    results: list[Tensor],
    probes: int,
    generator: torch.Generator,
) -> None:
    """Changes `sums` and `results`: adds one batch."""
    wanted = {site.layer.index for site in sites}
    values: dict[int, Tensor] = {}
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = call_layer(layer, args, kwargs)
        if layer.index in wanted:
            if not value.requires_grad:
                value = value.detach().requires_grad_(True)
            values[layer.index], arguments[layer.index] = value, (args, kwargs)
        return value

    with torch.enable_grad():
        outputs = float_tensors(sim.graph.run(flat, call))
    samples = outputs[0].shape[0] if outputs[0].dim() else 1
    indices = list(values)
    gradients: list[tuple[bool, dict[int, Tensor]]] = []
    for is_kl, directions in _directions(outputs, probes, generator):
        found = torch.autograd.grad(
            outputs, [values[i] for i in indices], directions, retain_graph=True, allow_unused=True
        )
        gradients.append((is_kl, {i: g for i, g in zip(indices, found, strict=True) if g is not None}))
    with torch.no_grad():
        products: dict[tuple[int, int], Tensor] = {}
        for site in sites:
            _add_site(site, values, arguments, gradients, samples, products)
        for key, product in products.items():
            squares = product.double().square().cpu()  # [2 * probes, samples]: kl first
            sums[key].append(torch.stack([0.5 * squares[:probes].mean(0), squares[probes:].mean(0)], 1))
        energy = sum(output.double().square().reshape(samples, -1).sum(1) for output in outputs)
        axis = class_axis(outputs[0])
        predictions = outputs[0].numel() / samples / (outputs[0].shape[axis] if axis is not None else 1)
        elements = sum(output.numel() for output in outputs) / samples
        sizes = torch.tensor([predictions, elements], dtype=torch.float64).expand(samples, 2)
        results.append(torch.cat([energy[:, None].cpu(), sizes], 1))


def _directions(
    outputs: list[Tensor], probes: int, generator: torch.Generator
) -> Iterator[tuple[bool, list[Tensor | None]]]:
    """Random directions u at the results: of covariance diag(p) - p p^T for the KL, then of the identity.

    With signs e and probabilities p, u = sqrt(p) e - p <sqrt(p), e> has that covariance exactly, and is never as rare
    and large as the gradient at a sampled label, which for sure predictions is almost always zero.
    """

    def signs(like: Tensor) -> Tensor:
        return (torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1).to(like)

    axis = class_axis(outputs[0])
    for _ in range(probes):
        first = torch.full_like(outputs[0], math.nan)
        if axis is not None:
            p = outputs[0].detach().softmax(axis)
            root = p.sqrt() * signs(p)
            first = root - p * root.sum(axis, keepdim=True)
        yield True, [first, *(torch.zeros_like(output) for output in outputs[1:])]
    for _ in range(probes):
        yield False, [signs(output) for output in outputs]


def _add_site(
    site: _Site,
    values: dict[int, Tensor],
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]],
    gradients: list[tuple[bool, dict[int, Tensor]]],
    samples: int,
    products: dict[tuple[int, int], Tensor],
) -> None:
    """Changes `products`: adds g . d of every candidate, [directions, samples]; sites of one quantizer add up."""
    index = site.layer.index
    g = torch.stack([found.get(index, torch.zeros_like(values[index])) for _, found in gradients])
    for number, candidate in enumerate(site.candidates):
        if isinstance(site.quantizer, WeightQuantizer):
            d = _with_weight(site.layer, *arguments[index], _change(site.quantizer, candidate))
        else:
            value = values[index].detach()
            d = fake_quantize(value, candidate.encoding or site.quantizer.required_encoding()) - value
        key = (id(site.quantizer), number)
        product = _dots(g, d, samples)
        products[key] = products[key] + product if key in products else product


def _change(quantizer: WeightQuantizer, candidate: _Candidate) -> Tensor:
    weight = quantizer.weight.detach()
    if candidate.encoding is not None:
        return fake_quantize(weight, candidate.encoding) - weight
    enabled, quantizer.enabled = quantizer.enabled, True
    change = quantizer.quantized().detach() - weight
    quantizer.enabled = enabled
    return change


def _with_weight(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor) -> Tensor:
    """The layer's output with another weight and no bias; it is linear in both."""
    if layer.module is not None:
        bias = getattr(layer.module, "bias", None)
        own = {"weight": weight} | ({"bias": torch.zeros_like(bias)} if isinstance(bias, Tensor) else {})
        return functional_call(layer.module, own, args, kwargs)
    assert layer.function is not None
    assert layer.weight_source is not None
    owner, attribute, _ = layer.weight_source

    def replaced(source: Any, value: Any) -> Any:
        if not isinstance(source, Layer) or source.owner is None:
            return value
        return weight if (source.owner, source.attribute) == (owner, attribute) else torch.zeros_like(value)

    args = tuple(replaced(source, value) for source, value in zip(layer.args, args, strict=True))
    return layer.function(*args, **{key: replaced(layer.kwargs[key], value) for key, value in kwargs.items()})


def _dots(g: Tensor, d: Tensor, samples: int) -> Tensor:
    """g [directions, ..] times d [..], summed by sample: [directions, samples].

    What has no sample axis (a position embedding) gives one sum for all: since directions are independent from sample
    to sample, its square is the sum of theirs in expectation, and every sample gets an equal share.
    """
    if not d.dim() or d.shape[0] % samples:
        return ((g * d).reshape(len(g), -1).sum(1, keepdim=True) / math.sqrt(samples)).expand(-1, samples)
    return torch.einsum("dnx,nx->dn", g.reshape(len(g), samples, -1), d.reshape(samples, -1))


def _rows(sites: list[_Site], sums: dict[tuple[int, int], list[Tensor]], results: Tensor) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for site in sites:
        if id(site.quantizer) in seen:
            continue
        seen.add(id(site.quantizer))
        part = "weight" if isinstance(site.quantizer, WeightQuantizer) else "output"
        for number, candidate in enumerate(site.candidates):
            rows = torch.cat([torch.cat(sums[id(site.quantizer), number]), results], 1)
            kl, kl_error = jackknife(lambda s: s[..., 0] / s[..., 3], rows)
            sqnr, sqnr_error = jackknife(lambda s: 10 * torch.log10(s[..., 2] / s[..., 1]), rows)
            total = rows.sum(0)
            found = (site.quantizer.name, part, candidate.bits, candidate.granularity, candidate.encoding is None)
            numbers = (kl, kl_error, sqnr, sqnr_error, float(total[1] / total[4]))
            yield dict(zip(ESTIMATE_COLUMNS, (*found, *numbers), strict=True))
