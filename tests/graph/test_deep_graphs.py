"""A graph of thousands of layers is copied and sent to workers like any other: no work follows neighbours in depth."""

import copy
import sys
from itertools import pairwise

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qlab.graph import Layer, LayerGraph
from qlab.sim.transport import from_bytes, to_bytes

DEPTH = 3 * sys.getrecursionlimit()


def chain(depth: int) -> LayerGraph:
    """x - 1 - 1 - ... with a ReLU at its beginning, built by hand: capture takes seconds for so many."""
    root = nn.Sequential(nn.ReLU())
    x = Layer("x", None, None, None, kind="input")
    x.shape, x.dtype = (None, 2), torch.float32
    layers = [x, Layer("0", None, root[0], "0", (x,))]
    layers += [Layer(f"sub_{i}", torch.sub, None, None, (None, 1)) for i in range(depth)]
    for before, layer in pairwise(layers[1:]):
        layer.args = (before, 1)
    in_spec = pytree.tree_structure(((0,), {}))
    return LayerGraph(root, layers, [layers[-1]], in_spec, pytree.tree_structure(0), ["x"], 1, [])


def check_twin(graph: LayerGraph, twin: LayerGraph) -> None:
    x = torch.tensor([[5.0, -5.0]])
    assert torch.equal(twin.run([x]), torch.tensor([[5.0, 0.0]]) - DEPTH)
    assert torch.equal(graph.run([x]), twin.run([x]))
    assert not set(map(id, graph.layers)) & set(map(id, twin.layers))
    for layer, copied in zip(graph, twin, strict=True):
        assert [each.index for each in copied.users] == [each.index for each in layer.users]
        assert all(each is twin.layers[each.index] for each in (*copied.users, *copied.inputs))
    assert twin["0"].module is twin.root[0] is not graph.root[0]


def test_a_deep_graph_is_copied():
    graph = chain(DEPTH)
    check_twin(graph, copy.deepcopy(graph))


def test_a_deep_graph_travels_to_another_process():
    graph = chain(DEPTH)
    check_twin(graph, from_bytes(to_bytes(graph)))


def test_a_layer_that_travels_without_its_graph_is_whole():
    layer = from_bytes(to_bytes(chain(3)["sub_1"]))
    assert (layer.name, layer.function, layer.args[0].name) == ("sub_1", torch.sub, "sub_0")
