"""How the cases of an analysis are cut into pieces, by the kind of score."""

from collections.abc import Iterator, Sequence
from typing import Any

from qlab.analysis.cases import Case
from qlab.analysis.ledger import Ledger
from qlab.analysis.sweep import Work
from qlab.analysis.tasks import Piece
from qlab.sim import Evaluation, PerSample, QuantSim

_PIECES = 8  # with workers, at least so many pieces


class Plan:
    """The pieces of one analysis.

    Scores that are sums over samples go batch by batch, so that all rows have a first value soon; other scores of
    outputs need all batches at once. A score that calls the model takes full runs; the distance from the float model is
    swept beside it, on `probe`. is_shared: make enough pieces for several workers.
    """

    def __init__(self, judge: Evaluation, cases: Sequence[Case], probe: Sequence[Any], is_shared: bool) -> None:
        self.judge, self.cases, self.probe, self.is_shared = judge, list(cases), list(probe), is_shared

    @property
    def steps(self) -> int:
        """How many outcomes there will be, as far as is known."""
        if self.judge.batches is None:
            return len(self.cases) * (len(self.probe) + 1)
        return len(self.cases) * (max(len(self.judge.batches), 1) if isinstance(self.judge, PerSample) else 1)

    def pieces(self, sim: QuantSim) -> Iterator[Piece]:
        """The pieces, most telling first."""
        judge = self.judge
        if judge.batches is None:
            for number, batch in enumerate(self.probe):
                for cases in self._shares(len(self.probe)):
                    yield Piece(cases, number, (batch,), None)
            for cases in self._shares(1):
                yield Piece(cases, 0, (), judge, calls_model=True)
        elif isinstance(judge, PerSample):
            for number, batch in enumerate(judge.batches):
                for cases in self._shares(len(judge.batches)):
                    yield Piece(cases, number, (batch,), judge.only(sim, number, batch))
        else:
            for cases in self._shares(1):
                yield Piece(cases, 0, tuple(judge.batches), judge)

    def brute_force(self, layers: int, ledger: Ledger) -> Work:
        """The work of the sweeps if every case were a full run."""
        runs = sum(len(outcomes) for outcomes in ledger.outcomes.values())
        if self.judge.batches is not None and not isinstance(self.judge, PerSample):
            runs *= len(list(self.judge.batches))
        return Work(layers * runs, float(runs))

    def _shares(self, batches: int) -> Iterator[tuple[Case, ...]]:
        """All cases at once, or in shares where workers would otherwise have fewer than _PIECES pieces."""
        shares = -(-_PIECES // max(batches, 1)) if self.is_shared else 1
        size = -(-len(self.cases) // shares)
        for start in range(0, len(self.cases), size):
            yield tuple(self.cases[start : start + size])
