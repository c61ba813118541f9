"""AdaRound as published: soft rounding trained on minibatches, the activation function in the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qlab.graph import Layer, call_layer
from qlab.quantization.rounding import Adam, SoftRounding
from qlab.sim import QuantSim, Role
from qlab.sim.streaming import Arguments
from qlab.techniques.rounding_task import RoundingTask

SAMPLES = 32
"""Samples a step, as in the paper."""

_FOLLOWED = frozenset({"batch_norm", "relu", "relu6", "clip", "leaky_relu", "prelu"})


def train_rounding(
    task: RoundingTask, soft: SoftRounding, max_bytes: int, seed: int, each: Callable[[int], None], rate: float = 1e-3
) -> Tensor:
    """Levels [groups, M, K], each the floor of the weight or one above.

    Loss: squared error after the activation function that is fused with the layer, summed over channels and averaged
    over samples and positions, plus the regularizer. Inputs are those of the sim as rounded so far, targets those of
    the float model. As many batches as fit `max_bytes` are drawn from. each: called with every step's number.
    """
    quantizer, form = task.quantizer, task.form
    encoding, weight = quantizer.required_encoding(), quantizer.weight.detach()
    scale, zero = (part.expand_as(weight).contiguous() for part in encoding.broadcast(weight.shape))
    low, high = encoding.qmin - zero, encoding.qmax - zero
    floor = torch.minimum(torch.maximum((weight / scale).floor(), low), high)
    v = soft.start((weight / scale - floor).clamp(0, 1 - 1e-6))
    adam = Adam(v, rate)
    following = activations(task.sim, task.layer)
    inputs, wanted, template = _samples(task, following, max_bytes)
    axis = 1 if form.windows is not None else -1
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
                output = _follow(following, _apply(task, template, inputs[drawn], rounded))
            # The loss's own derivative by the output: the loss itself is never needed.
            by_output = (output - wanted[drawn]).mul_(2 * output.shape[axis] / output.numel())
            (by_weight,) = torch.autograd.grad(output, [rounded], by_output)
            by_share = by_weight.mul_(scale).mul_(held == levels)
            adam.step(soft.gradient(v, share, by_share, soft.beta(step)))
    chosen = torch.minimum(torch.maximum(floor + (soft.share(v) >= 0.5), low), high)
    return form.matrix(chosen)


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
            template = of_sim
            output = _follow(following, call_layer(task.layer, of_float.args, of_float.kwargs))
            inputs.append(of_sim.args[operand])
            wanted.append(output)
            held += sum(t.numel() * t.element_size() for t in (inputs[-1], output))
            if held > max_bytes:
                break
    assert template is not None
    return torch.cat(inputs), torch.cat(wanted), template


def _apply(task: RoundingTask, template: Arguments, x: Tensor, weight: Tensor) -> Any:
    """The layer's output for inputs `x` and another weight, differentiable by the weight."""
    layer = task.layer
    if layer.module is not None:
        return functional_call(
            layer.module, {task.quantizer.attribute: weight}, (x, *template.args[1:]), template.kwargs
        )
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
