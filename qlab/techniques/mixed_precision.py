"""Mixed precision: bits where they matter. One pass over data estimates what every layer loses at every width.

The whole front of cost against loss follows from those numbers by a Lagrangian sweep; what is chosen, and some of the
rest, is verified by true evaluations, because the errors of layers do not simply add up.
"""

from dataclasses import dataclass
from typing import Any

from qlab.analysis.shadow import require_calibrated
from qlab.errors import InputError
from qlab.progress import Progress, Silent
from qlab.quantization import QuantSpec
from qlab.settings import SettingError, setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation
from qlab.techniques.mixed_precision_front import Front
from qlab.techniques.mixed_precision_search import METRICS, Search
from qlab.techniques.technique import Report, Technique


@dataclass(frozen=True)
class MixedPrecision(Technique):
    """Gives each layer the bits that it needs: the least loss at no more than a budget's cost.

    metric 'size' moves weights, at a cost of numel * bits; activations stay as they are set. 'bit_operations' moves the
    weights of a layer together with the activation that they multiply, at multiply-accumulates * bits * bits. What
    shares a grid (tied weights, all readers of one activation) has one width. budget: the cost of the same model at
    this many bits throughout, fractions allowed.

    One pass over `batches` estimates the noise in the result from every tensor at every width; a Lagrangian sweep
    turns that into the whole front; the budget's choice, `verify` further points, every single width and the sim as it
    was are truly evaluated with `score` (SQNR without one), and the best within the budget is taken. With the budget's
    own width among `bits` that is no worse, within the standard error, than this width throughout; without it the notes
    say by how much it is. The sweep is as quick with many widths as with few; name those that the target computes with,
    for a file stores 5, 6 or 7 bits in 8.
    Report.values['front'] is the table of all points, `front` gives them without changing the sim.

    When: before AdaRound and its kin, whose roundings belong to one width. Cost: about eight forwards of the batches
    and one evaluation for each verified point.

    Sources: Shoham and Gersho 1988, doi.org/10.1109/29.90373; Dong et al. 2020, arXiv:1911.03852 (HAWQ-V2).
    """

    bits: Any = setting((4, 5, 6, 7, 8, 16), "widths to choose from, such as 4, 8, 16")  # noqa: RUF009
    budget: float = setting(6.0, "cost at most that of one width throughout", minimum=2.0, maximum=16.0, unit="bits")
    metric: str = setting("size", "what a configuration costs", choices=tuple(METRICS))
    skip: Any = setting((), "globs of layers that keep their bits")  # noqa: RUF009
    verify: int = setting(3, "points of the front to evaluate beside the chosen one", minimum=0, maximum=50)
    seed: int = setting(0, "of the estimate's random directions", minimum=0)
    executor: Any = setting(  # noqa: RUF009
        None, "workers (concurrent.futures, dask) for the evaluations of points", hidden=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", _widths(self.bits))
        globs = self.skip.split(",") if isinstance(self.skip, str) else self.skip
        object.__setattr__(self, "skip", tuple(glob.strip() for glob in globs if glob.strip()))

    def front(
        self, sim: QuantSim, batches: Any, score: "Evaluation | Any" = None, progress: Progress | None = None
    ) -> Front:
        """The front of `sim`, which is not changed; arguments as in `apply`. Raises InputError without data, where
        nothing can move, and for a budget below the cheapest configuration."""
        data = self._data(batches)
        assert data is not None
        if next(iter(data), None) is None:
            raise InputError("MixedPrecision needs at least one batch; the iterable was empty.")
        require_calibrated(sim)
        return Search(self, sim, data, score, progress or Silent()).front()

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: sets the chosen bits."""
        front = self.front(sim, batches, score, progress)
        chosen = front.chosen
        rows = []
        for layer, part, bits in chosen.settings:
            before = getattr(sim[layer], part).bits
            rows.append({"layer": layer, "part": part, "bits": bits, "before": before})
        chosen.apply(sim)
        summary = (
            f"{chosen.label} at {chosen.cost:.4g} of {front.budget:.4g} {front.cost_name}: {front.score_name} "
            f"{chosen.score}, {chosen.predicted:.1f} dB predicted"
        )
        values = {
            "front": front.to_pandas(),
            "configuration": dict(chosen.configuration),
            "cost": chosen.cost,
            "budget": front.budget,
            "predicted": chosen.predicted,
            "score": None if chosen.score is None else float(chosen.score),
        }
        return Report("MixedPrecision", summary, tuple(rows), front.notes, values)


def _widths(value: Any) -> tuple[int, ...]:
    """The widths of a list, a single number or text such as '4, 8', rising."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        found = {QuantSpec(bits=int(part)).bits for part in parts}
    except (ValueError, TypeError) as error:
        raise SettingError(f"MixedPrecision(bits=...) must be widths from 2 to 16, such as (4, 8); {error}") from None
    if not found:
        raise SettingError("MixedPrecision(bits=...) must hold at least one width, such as (4, 8).")
    return tuple(sorted(found))
