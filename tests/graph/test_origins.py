"""Where values come from is read off the graph: activations, integers, constants, masks, and weights behind views."""

import math

import torch
from torch import nn

from qlab.graph import Source, capture, origins
from qlab.graph.weight_views import viewed_weight, views_of


def of(model: nn.Module, *example: torch.Tensor):
    graph = capture(model.eval(), example)
    return graph, origins(graph)


class Positions(nn.Module):
    """Time steps to angles, constants to frequencies, both before any activation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, step):
        frequencies = torch.exp(-torch.arange(4) / 4)
        angles = step.float()[:, None] * frequencies
        return self.fc(torch.cat([angles.sin(), angles.cos()], -1))


def test_time_steps_and_frequencies_are_no_activations_until_a_weight_is_applied():
    _, found = of(Positions(), torch.tensor([3, 700, 12]))
    assert found["step"].source is Source.INTEGER
    assert found["exp"].source is Source.CONSTANT
    assert found["sin"].source is Source.INTEGER
    assert found["fc"].source is Source.ACTIVATION
    assert found["sin"].folds
    assert not found["cat"].folds  # the value that the linear layer takes


class Masked(nn.Module):
    """Scores with an additive mask made from token numbers."""

    def __init__(self, hide: float = -math.inf):
        super().__init__()
        self.embedding, self.hide = nn.Embedding(9, 4), hide

    def forward(self, tokens):
        x = self.embedding(tokens)
        mask = torch.zeros(tokens.shape).masked_fill(tokens == 0, self.hide)[:, None]
        return torch.softmax(x @ x.transpose(1, 2) + mask, -1)


def test_a_mask_is_known_from_its_numbers_and_stops_at_softmax():
    _, found = of(Masked(), torch.tensor([[1, 2, 0], [3, 0, 0]]))
    assert found["masked_fill"].mask
    assert found["masked_fill"].source is Source.INTEGER
    assert found["add"].mask
    assert found["add"].source is Source.ACTIVATION
    assert not found["matmul"].mask
    assert not found["softmax"].mask
    _, plain = of(Masked(hide=-3.0), torch.tensor([[1, 2, 0], [3, 0, 0]]))
    assert not any(origin.mask for origin in plain.values())


class Packed(nn.Module):
    """Two halves of one matrix, and the transpose of another."""

    def __init__(self):
        super().__init__()
        self.packed, self.table = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        (a, b), (c, d) = self.packed.chunk(2), self.bias.chunk(2)
        y = nn.functional.linear(x, a, c) * nn.functional.linear(x, b, d)
        return y @ self.table.t()


def test_weights_behind_slices_and_transposes_are_found_with_their_channel_axis():
    graph, _ = of(Packed(), torch.randn(2, 4))
    assert [viewed_weight(graph[name])[0].name for name in ("linear", "linear_1")] == ["packed", "packed"]
    parameter, axis = viewed_weight(graph["matmul"])
    assert (parameter.name, axis) == ("table", 0)
    views, uses = views_of(graph["packed"])
    assert len(views) == 3  # the split and its two parts
    assert [user.name for _, user in uses] == ["linear", "linear_1"]
    assert viewed_weight(graph["mul"]) is None
