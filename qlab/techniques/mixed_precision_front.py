"""The front of mixed precision as a value: configurations with their cost, what was predicted and what is true."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlab.analysis.shadow import set_bits
from qlab.sim import Measurement, QuantSim

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Point:
    """One configuration: bits by layer, what it costs and how good it is.

    kind: 'predicted', 'verified', 'uniform' (one width for all) or 'current' (the sim as it was given). predicted: the
    estimated SQNR of the result [dB]. score: truly measured, None where it was not. settings: (layer, part, bits) of
    every quantizer concerned.
    """

    cost: float
    predicted: float
    kind: str
    label: str
    configuration: dict[str, int]
    settings: tuple[tuple[str, str, int], ...]
    score: Measurement | None = None

    def apply(self, sim: QuantSim) -> None:
        """Changes `sim`: sets these bits. A rounding chosen for other bits is dropped."""
        for layer, part, bits in self.settings:
            quantizer = getattr(sim[layer], part)
            set_bits(quantizer, bits)


@dataclass(frozen=True)
class Front:
    """Configurations by rising cost, with the budget's choice.

    points: the sweep's, those of one width, and the sim as it was. chosen: the best verified one within the budget.
    budget: in units of cost. notes: what was left out, and why.
    """

    points: tuple[Point, ...]
    chosen: Point
    budget: float
    cost_name: str
    score_name: str
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> "pd.DataFrame":
        """One row a point: cost, score, error, kind, label, predicted [dB], verified, is_chosen, configuration.

        `verified` is the true score, NaN where there is none; there `score` is interpolated, by predicted SQNR, between
        those that were verified.
        """
        import numpy as np
        import pandas as pd

        verified_points = [p for p in self.points if p.score is not None and math.isfinite(p.score)]
        known = np.array(sorted((p.predicted, float(p.score or 0)) for p in verified_points)).reshape(-1, 2)
        rows = []
        for point in self.points:
            verified = math.nan if point.score is None else float(point.score)
            guess = float(np.interp(point.predicted, known[:, 0], known[:, 1])) if len(known) else math.nan
            error = None if point.score is None else point.score.standard_error
            rows.append(
                {
                    "cost": point.cost,
                    "score": guess if point.score is None else verified,
                    "error": math.nan if error is None else error,
                    "kind": point.kind,
                    "label": point.label,
                    "predicted": point.predicted,
                    "verified": verified,
                    "is_chosen": point is self.chosen,
                    "configuration": point.configuration,
                }
            )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """The front as a figure: cost against score."""
        from qlab.plots import pareto

        return pareto(self.to_pandas(), cost_name=self.cost_name, score_name=self.score_name)

    def __repr__(self) -> str:
        verified = sum(point.score is not None for point in self.points)
        return f"Front({len(self.points)} configurations, {verified} verified, chosen: {self.chosen.label})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {**self.plot()._repr_mimebundle_(), "text/plain": repr(self)}
