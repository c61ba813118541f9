"""The layout puts every layer after its inputs, never two in one place, and reads each edge once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlab.plots import layered_layout


@st.composite
def graphs(draw) -> tuple[list[str], list[tuple[str, str]]]:
    layers = [f"l{i}" for i in range(draw(st.integers(1, 25)))]
    pairs = [(source, target) for i, source in enumerate(layers) for target in layers[i + 1 :]]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return draw(st.permutations(layers)), edges


@given(graphs(), st.none() | st.integers(2, 6))
def test_layers_come_after_their_inputs_and_never_share_a_place(graph, fold):
    layers, edges = graph
    places = layered_layout(layers, edges, fold=fold)
    assert places["layer"].tolist() == list(layers)
    depth = dict(zip(places["layer"], places["depth"], strict=True))
    assert all(depth[source] < depth[target] for source, target in edges)
    inputs = set(layers) - {target for _, target in edges}
    assert {layer for layer in layers if depth[layer] == 0} == inputs
    assert len(set(places[["x", "y"]].round(6).itertuples(index=False, name=None))) == len(layers)


def test_even_bands_run_right_and_odd_bands_back():
    chain = [str(i) for i in range(6)]
    places = layered_layout(chain, list(pairwise(chain)), fold=3)
    assert places["x"].tolist() == [0, 1, 2, 2, 1, 0]
    assert places["y"].tolist() == [0, 0, 0, -2, -2, -2]


def test_edges_are_read_once_however_many_there_are():
    chain = [str(i) for i in range(50_000)]
    places = layered_layout(chain, pairwise(chain))  # an iterator cannot be read twice; a recursion would overflow
    assert places["depth"].tolist() == list(range(50_000))


def test_a_cycle_is_named():
    with pytest.raises(ValueError, match="cycle through 'a', 'b'"):
        layered_layout(["a", "b"], [("a", "b"), ("b", "a")])
