"""The work of an analysis in pieces, here or on the workers of an executor; the numbers are the same.

A piece is one batch and some cases, or some cases of a score that calls the model itself. Pieces do not depend on one
another, so that one that a dying worker takes along is computed again.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from qlab.analysis.cases import Case
from qlab.analysis.divergence import Divergence
from qlab.analysis.ledger import Outcome, scored
from qlab.analysis.sweep import Sweep, Work
from qlab.errors import Cancelled
from qlab.sim import Evaluation, PerSample, QuantSim
from qlab.sim.transport import from_bytes, to_bytes

IN_FLIGHT = 16  # pieces sent at once: their batches, and the sim with each, are in memory


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


class Workers:
    """Runs pieces on an executor (concurrent.futures or alike), the sim sent along as bytes.

    `lost` counts the pieces that a worker took along and that were computed here instead; `reason` says why the last.
    """

    def __init__(self, executor: Executor, sweep: Sweep, sim: QuantSim, max_bytes: int) -> None:
        self.lost = 0
        self.reason = ""
        self._executor = executor
        self._sweep = sweep
        self._package = to_bytes((sim, tuple(sweep.cases), max_bytes, torch.get_num_threads()))
        self._key = hashlib.sha256(self._package).hexdigest()
        self._in_flight = min(IN_FLIGHT, max(2, max_bytes // len(self._package)))

    def run(self, pieces: Iterator[Piece], waiting: Callable[[], None]) -> Generator[list[Outcome], None, None]:
        """The outcomes of each piece, in the order in which they arrive. waiting: called often; may raise to stop."""
        pending: dict[Future[bytes], Piece] = {}
        try:
            for piece in pieces:
                yield from self._send(piece, pending)
                while len(pending) >= self._in_flight:
                    yield from self._arrived(pending, waiting)
            while pending:
                yield from self._arrived(pending, waiting)
        finally:
            for future in pending:
                future.cancel()

    def _send(self, piece: Piece, pending: dict["Future[bytes]", Piece]) -> Iterator[list[Outcome]]:
        data = to_bytes(piece)
        try:
            pending[self._executor.submit(_work, self._key, self._package, data)] = piece
        except RuntimeError as error:  # the pool is broken or closed
            yield self._here(piece, error)

    def _arrived(self, pending: dict["Future[bytes]", Piece], waiting: Callable[[], None]) -> Iterator[list[Outcome]]:
        done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        waiting()
        for future in done:
            piece = pending.pop(future)
            try:
                outcomes, work = from_bytes(future.result())
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  computed again here; if the piece itself is at fault, that raises
                yield self._here(piece, error)
                continue
            self._sweep.work += work
            yield outcomes

    def _here(self, piece: Piece, error: Exception) -> list[Outcome]:
        self.lost += 1
        self.reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return list(run_piece(self._sweep, piece))


_known = threading.local()


def _work(key: str, package: bytes, data: bytes) -> bytes:
    """One piece, in a worker; the sim is unpacked once."""
    if getattr(_known, "key", None) != key:
        sim, cases, max_bytes, threads = from_bytes(package)
        torch.set_num_threads(threads)  # sums depend on how they are split
        _known.key, _known.sweep = key, Sweep(sim, cases, max_bytes)
    sweep: Sweep = _known.sweep
    sweep.work = Work()
    outcomes: Sequence[Outcome] = list(run_piece(sweep, from_bytes(data)))
    return to_bytes((outcomes, sweep.work))
