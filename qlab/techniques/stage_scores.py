"""How AutoQuant scores a state: the person's score and, from the same outputs, the SQNR that ranks equal scores."""

import math

import torch

from qlab.errors import Cancelled, InputError
from qlab.progress import Progress
from qlab.sim import SQNR, Measurement, PerSample, QuantSim
from qlab.sim.evaluate import Evaluation, float_tensors


class Scores:
    """Scores states of one sim; `float_score` comes first, as it remembers the original float results."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.name = evaluation.name
        self._sqnr = SQNR(evaluation.batches) if isinstance(evaluation, PerSample) else None

    def float_score(self, sim: QuantSim) -> Measurement:
        """The float model's score; raises InputError where the score fails or is NaN: nothing could be compared."""
        try:
            if self._sqnr is not None:
                self._sqnr.prepare(sim)
            score = sim.evaluate(self.evaluation, quantized=False)
        except Cancelled:
            raise
        except Exception as error:
            raise InputError(
                f"the score ({self.name}) failed on the float model: {type(error).__name__}: {error}. There is nothing "
                "to compare with; try it by sim.evaluate(score, quantized=False)."
            ) from error
        if math.isnan(score):
            raise InputError(f"the score ({self.name}) of the float model is NaN: there is nothing to compare with.")
        return score

    def of(self, sim: QuantSim, progress: Progress) -> tuple[Measurement, float]:
        """(score, SQNR of the result in dB) in one pass, NaN for the SQNR where the score gives no outputs.

        Raises whatever the score raises, and ValueError where it is NaN.
        """
        evaluation, sqnr = self.evaluation, math.nan
        if not isinstance(evaluation, PerSample):
            progress.step(0, 1, "score")
            score = sim.evaluate(evaluation)
        else:
            rows, noise = [], []
            with sim.evaluating():
                evaluation.prepare(sim)
                for number, batch in enumerate(evaluation.batches):
                    progress.step(0, 1, f"score, batch {number}")
                    output = sim.output(batch)
                    rows.append(evaluation.tally(sim, number, batch, output))
                    if self._sqnr is not None and float_tensors(output):
                        noise.append(self._sqnr.tally(sim, number, batch, output))
            score = evaluation.of_tallies(torch.cat(rows))
            if noise and self._sqnr is not None:
                sqnr = float(self._sqnr.of_tallies(torch.cat(noise)))
        if math.isnan(score):
            raise ValueError(f"the score ({self.name}) is NaN")
        return score, sqnr
