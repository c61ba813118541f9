"""One small example of every figure, and its empty form, for the tests that hold for all of them."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from qlab import plots


def bins(count: int = 32) -> pd.DataFrame:
    edges = np.linspace(-1, 1, count + 1)
    return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": np.arange(count) + 1})


def channels(layers: list[str], count: int = 4) -> pd.DataFrame:
    rows = [(name, c, -(c + 1.0) * (i + 1), c + 1.0) for i, name in enumerate(layers) for c in range(count)]
    return pd.DataFrame(rows, columns=["layer", "channel", "min", "max"])


def _sensitivity(layers: list[str]) -> plots.Plot:
    return plots.sensitivity(
        pd.DataFrame({"layer": layers, "score": np.linspace(0.5, 0.9, len(layers)), "note": layers}), baseline=0.9
    )


def _graph(layers: list[str]) -> plots.Plot:
    edges = pd.DataFrame({"source": layers[:-1], "target": layers[1:]})
    return plots.graph(
        pd.DataFrame({"layer": layers, "value": np.arange(len(layers)) * 1.0, "kind": layers, "note": layers}), edges
    )


def _tree(layers: list[str]) -> plots.Plot:
    frame = {"stage": layers, "parent": [None, *layers[:-1]], "score": 0.5, "verdict": layers, "reason": layers}
    return plots.decision_tree(pd.DataFrame(frame))


def _pareto(layers: list[str]) -> plots.Plot:
    return plots.pareto(pd.DataFrame({"cost": np.arange(len(layers)) + 1.0, "score": 0.5, "label": layers}))


def _heat(layers: list[str]) -> plots.Plot:
    frame = channels(layers)
    return plots.heat_map(frame.assign(value=frame["max"]))


# each takes layer names and makes the figure that shows them
EXAMPLES: dict[str, Callable[[list[str]], plots.Plot]] = {
    "histogram": lambda names: plots.histogram(bins(), clip=(-0.5, 0.5), name=names[0]),
    "weight_ranges": lambda names: plots.weight_ranges(channels(names[:1]), name=names[0]),
    "relative_ranges": lambda names: plots.relative_ranges(channels(names)),
    "heat_map": _heat,
    "sensitivity": _sensitivity,
    "noise": lambda names: plots.noise(pd.DataFrame({"layer": names, "sqnr": np.arange(len(names)) + 15.0})),
    "comparison": lambda names: plots.comparison(
        pd.DataFrame({"layer": names, "before": 1.0, "after": np.arange(len(names)) * 1.0})
    ),
    "pareto": _pareto,
    "training": lambda names: plots.training(
        pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0], "score": [np.nan, 0.5]})
    ),
    "range_history": lambda names: plots.range_history(
        pd.DataFrame({"step": [0, 1], "low": [-1.0, -0.5], "high": [1.0, 0.5], "clipped": [0.0, 0.01]}), name=names[0]
    ),
    "decision_tree": _tree,
    "graph": _graph,
}


@pytest.fixture(params=sorted(EXAMPLES))
def example(request: pytest.FixtureRequest) -> Callable[[list[str]], plots.Plot]:
    """A function that makes a figure of layers with the given names."""
    return EXAMPLES[request.param]


@pytest.fixture(params=sorted(EXAMPLES))
def empty_plot(request: pytest.FixtureRequest) -> plots.Plot:
    empty = pd.DataFrame()
    return getattr(plots, request.param)(empty, *([empty] if request.param == "graph" else []))


@pytest.fixture(scope="session")
def hostile() -> str:
    """A layer name that would run a script wherever it is not escaped."""
    return "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture(scope="session")
def all_plots() -> list[plots.Plot]:
    return [make(["conv1", "fc"]) for make in EXAMPLES.values()]
