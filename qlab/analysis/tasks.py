"""The work of an analysis in pieces, here or on the workers of an executor; the numbers are the same.

A piece is one batch and some cases, or some cases of a score that calls the model itself. Pieces do not depend on one
another, so that one that a dying worker takes along is computed again.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qlab.analysis.cases import Case
from qlab.analysis.divergence import Divergence
from qlab.analysis.ledger import Outcome, scored
from qlab.analysis.sweep import Sweep, Work
from qlab.sim import Evaluation, PerSample, QuantSim
from qlab.sim.workers import Workers


@dataclass(frozen=True)
class Piece:
    """What one call computes.

    cases: those to report. batches: what to run them on. evaluation: PerSample on the one batch, another Evaluation on
    all of them, None where only the distance from the float model is asked for. calls_model: the evaluation runs the
    model itself.
    """

    cases: tuple[Case, ...]
    first: int
    batches: tuple[Any, ...]
    evaluation: Evaluation | None
    calls_model: bool = False


def run_piece(sweep: Sweep, piece: Piece) -> Iterator[Outcome]:
    """The outcomes of a piece, one after the other; a score that fails is told in its outcome."""
    if piece.calls_model:
        assert piece.evaluation is not None
        for case in piece.cases:
            sim = sweep.switch_to(case)
            with sim.evaluating():
                yield scored(case, piece.first, lambda sim=sim: piece.evaluation.of_model(sim))
        return
    base = Case("float")
    needed = list(dict.fromkeys((base, *piece.cases)))
    reference: list[Divergence] = []
    reported = set(piece.cases)
    for case, outputs in sweep.outputs(piece.batches, needed):
        reference = reference or list(map(Divergence, outputs))
        if case in reported:
            yield _outcome(sweep.sim, piece, case, reference, outputs)


def _outcome(sim: QuantSim, piece: Piece, case: Case, reference: list[Divergence], outputs: list[Any]) -> Outcome:
    divergence = torch.cat([wanted.rows(output) for wanted, output in zip(reference, outputs, strict=True)])
    evaluation = piece.evaluation
    if evaluation is None:
        return Outcome(case, piece.first, divergence=divergence)
    if isinstance(evaluation, PerSample):
        batch, output = piece.batches[0], outputs[0]
        return scored(case, piece.first, lambda: evaluation.tally(sim, 0, batch, output), divergence)
    return scored(case, piece.first, lambda: evaluation.of_outputs(sim, outputs), divergence)


def on_workers(
    workers: Workers, sweep: Sweep, pieces: Iterator[Piece], waiting: Callable[[], None]
) -> Generator[list[Outcome], None, None]:
    """The outcomes of each piece, in the order in which they arrive, from workers that share the sweep; the work that
    they took is added to that of `sweep`. waiting: called often meanwhile; may raise to stop."""
    arriving = workers.as_they_arrive(_outcomes, pieces, waiting)
    try:
        for outcomes, work in arriving:
            sweep.work += work
            yield outcomes
    finally:
        arriving.close()


def _outcomes(sweep: Sweep, piece: Piece) -> tuple[list[Outcome], Work]:
    """The outcomes of a piece and the work that they took, in a worker."""
    sweep.work = Work()
    return list(run_piece(sweep, piece)), sweep.work
