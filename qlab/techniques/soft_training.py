"""AdaRound as published: soft rounding trained on minibatches, the activation function in the loss."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlab.graph import Layer, call_layer
from qlab.quantization.rounding import Adam, SoftRounding
from qlab.sim import QuantSim, Role
from qlab.sim.streaming import Arguments
from qlab.techniques.rounding_task import RoundingTask

SAMPLES = 32
"""Samples a step, as in the paper."""

_ELEMENTWISE = frozenset({"relu", "relu6", "clip", "leaky_relu"})
_FOLLOWED = _ELEMENTWISE | {"batch_norm", "prelu"}


def train_rounding(
    task: RoundingTask, soft: SoftRounding, max_bytes: int, seed: int, each: Callable[[int], None], rate: float = 1e-3
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, levels [groups, m, K]) of each part of the layer, each level the floor of the weight or one above.

    Loss: squared error after the activation function that is fused with the layer, summed over channels and averaged
    over samples and positions, plus the regularizer. Inputs are those of the sim as rounded so far, targets those of
    the float model. As many batches as fit `max_bytes` are drawn from, the same samples for every part. each: called
    with every step's number.
    """
    following = activations(task.sim, task.layer)
    inputs, wanted, template = _samples(task, following, max_bytes)
    for rows in task.parts if _has_parts(task, following) else [slice(None)]:
        yield rows, _train_rows(task, rows, following, (inputs, wanted, template), (soft, seed, each, rate))


_Data = tuple[Tensor, Tensor, Arguments]
_Course = tuple[SoftRounding, int, Callable[[int], None], float]


def _train_rows(task: RoundingTask, rows: slice, following: list[Layer], data: _Data, course: _Course) -> Tensor:
    """The levels of some output channels."""
    (inputs, wanted, template), (soft, seed, each, rate) = data, course
    quantizer, form = task.quantizer, task.form
    encoding, shape = quantizer.required_encoding(), quantizer.weight.shape
    weight = quantizer.weight.detach()[rows]
    scale, zero = (part.expand(shape)[rows].contiguous() for part in encoding.broadcast(shape))
    low, high = encoding.qmin - zero, encoding.qmax - zero
    floor = torch.minimum(torch.maximum((weight / scale).floor(), low), high)
    v = soft.start((weight / scale - floor).clamp(0, 1 - 1e-6))
    adam = Adam(v, rate)
    axis = 1 if form.windows is not None else -1
    wanted = wanted if rows == slice(None) else wanted.movedim(axis, 0)[rows].movedim(0, axis)
    generator = torch.Generator().manual_seed(seed)
    with task.sim.evaluating(), torch.no_grad():
        for step in range(soft.steps):
            each(step)
            drawn = torch.randint(len(inputs), (SAMPLES,), generator=generator).to(inputs.device)
            share = soft.share(v)
            levels = floor + share
            held = torch.minimum(torch.maximum(levels, low), high)
            rounded = (held * scale).requires_grad_()
            with torch.enable_grad():
                output = _follow(following, _apply(task, template, inputs[drawn], rounded, rows))
            # The loss's own derivative by the output: the loss itself is never needed.
            by_output = (output - wanted[drawn]).mul_(2 * output.shape[axis] / output.numel())
            (by_weight,) = torch.autograd.grad(output, [rounded], by_output)
            by_share = by_weight.mul_(scale).mul_(held == levels)
            adam.step(soft.gradient(v, share, by_share, soft.beta(step)))
    chosen = torch.minimum(torch.maximum(floor + (soft.share(v) >= 0.5), low), high)
    return form.matrix(chosen) if rows == slice(None) else chosen.reshape(form.groups, -1, form.inputs)


def _has_parts(task: RoundingTask, following: list[Layer]) -> bool:
    """Whether the module computes some of its outputs when given those rows of its weight and bias."""
    module = task.layer.module
    return (
        isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and task.form.groups == 1
        and all(layer.kind in _ELEMENTWISE for layer in following)
    )


def activations(sim: QuantSim, layer: Layer) -> list[Layer]:
    """The layers fused behind `layer` that take nothing but its output: BatchNorm and the activation function."""
    found, current = [], layer
    while sim.placed[current.name].role is Role.FUSED and len(current.users) == 1:
        current = current.users[0]
        if current.kind not in _FOLLOWED or len(current.inputs) != 1:
            break
        found.append(current)
    return found


@torch.no_grad()
def _samples(task: RoundingTask, following: list[Layer], max_bytes: int) -> tuple[Tensor, Tensor, Arguments]:
    """(inputs in the sim, outputs wanted, one batch's arguments) over the batches that fit."""
    assert task.stop is not None
    operand, held = task.form.operand, 0
    inputs: list[Tensor] = []
    wanted: list[Tensor] = []
    template = None
    with task.sim.evaluating():
        for of_float, of_sim in task.stop.arguments():
            template = of_sim if template is None else template
            output = _follow(following, call_layer(task.layer, of_float.args, of_float.kwargs))
            held += sum(t.numel() * t.element_size() for t in (of_sim.args[operand], output))
            if held > max_bytes and inputs:
                break
            inputs.append(of_sim.args[operand])
            wanted.append(output)
            del of_float, of_sim  # before the next batch is read
    assert template is not None
    return _joined(inputs), _joined(wanted), template


def _joined(parts: list[Tensor]) -> Tensor:
    """Changes `parts`: what torch.cat makes of them, each let go when it is copied, so that none is held twice."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    stop = len(whole)
    while parts:
        part = parts.pop()
        whole[stop - len(part) : stop] = part
        stop -= len(part)
    return whole


def _apply(task: RoundingTask, template: Arguments, x: Tensor, weight: Tensor, rows: slice) -> Any:
    """The layer's output for inputs `x` and another weight (or rows of it), differentiable by the weight."""
    layer = task.layer
    if layer.module is not None:
        used = {task.quantizer.attribute: weight}
        if rows != slice(None) and isinstance(layer.module.bias, Tensor):
            used["bias"] = layer.module.bias[rows]
        return functional_call(layer.module, used, (x, *template.args[1:]), template.kwargs)
    args = list(template.args)
    for position, source in enumerate(layer.args):
        if isinstance(source, Layer) and source.owner is task.quantizer.owner:
            args[position] = weight if source.attribute == task.quantizer.attribute else args[position]
    args[task.form.operand] = x
    assert layer.function is not None
    return layer.function(*args, **template.kwargs)


def _follow(following: list[Layer], value: Tensor) -> Tensor:
    for layer in following:
        value = call_layer(layer, (value, *layer.args[1:]), layer.kwargs)
    return value
