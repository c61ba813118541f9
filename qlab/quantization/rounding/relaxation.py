"""AdaRound on second moments: the whole data set in each step, so that a few hundred deterministic steps do.

The data term e G e^T and its gradient 2 e G are those of the reconstruction error over all rows at once. What is lost
against the form on minibatches is only the activation function in the loss.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from qlab.quantization.rounding.adam import Adam
from qlab.quantization.rounding.problem import RoundingProblem
from qlab.quantization.rounding.soft import SoftRounding


def relax(
    problem: RoundingProblem,
    soft: SoftRounding,
    rate: float = 0.01,
    each: Callable[[int], None] | None = None,
    output: float | None = None,
) -> Tensor:
    """Levels [B, M, K], each the floor of the target or one above, after `soft.steps` steps of Adam.

    The error is measured in units of the mean squared output, mean(t G t^T), so that the regularizer weighs the same in
    every layer. each: called with the number of every step, to report it. output: that mean over more rows than these.
    """
    output = float(problem.energy().mean()) if output is None else output
    problem = replace(problem, metric=problem.metric / max(output, 1e-30))
    floor = problem.floor()
    v = soft.start((problem.target / problem.scale - floor).clamp(0, 1 - 1e-6))
    adam = Adam(v, rate)
    for step in range(soft.steps):
        if each is not None:
            each(step)
        adam.step(relaxed_gradient(problem, soft, v, floor, soft.beta(step)))
    return problem.clamp(floor + (soft.share(v) >= 0.5))


def relaxed_loss(problem: RoundingProblem, soft: SoftRounding, v: Tensor, floor: Tensor, beta: float | None) -> Tensor:
    """What `relax` minimises, [].

    >>> import torch
    >>> one = torch.ones(1, 1, 1)
    >>> problem = RoundingProblem(0.5 * one, one, one, -8 * one, 7 * one)
    >>> relaxed_loss(problem, SoftRounding(10), SoftRounding.start(0.75 * one), 0 * one, None)  # (0.75 - 0.5)^2
    tensor(0.0625)
    """
    share = soft.share(v)
    loss = problem.error(problem.clamp(floor + share)).sum()
    return loss if beta is None else loss + soft.regularizer(share, beta)


def relaxed_gradient(
    problem: RoundingProblem, soft: SoftRounding, v: Tensor, floor: Tensor, beta: float | None
) -> Tensor:
    """The derivative of `relaxed_loss` by `v`, in closed form."""
    share = soft.share(v)
    levels = floor + share
    held = problem.clamp(levels)
    error = held * problem.scale - problem.target
    by_share = (error @ problem.metric).mul_(2 * problem.scale).mul_(held == levels)
    return soft.gradient(v, share, by_share, beta)
