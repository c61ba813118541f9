"""Replay: partial runs equal full ones bit for bit, run less, and keep to their budget."""

import pytest
import torch
from torch import nn

from qlab.graph import Replay, call_layer, capture
from tests.graph.models import residual


def chain(depth: int = 8) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def make(model: nn.Module, shape: tuple[int, ...], **options):
    graph = capture(model, torch.randn(2, *shape))
    changes = dict.fromkeys((layer.name for layer in graph), 0.0)
    batches = [[torch.randn(4, *shape)] for _ in range(3)]

    def call(layer, args, kwargs):
        value = call_layer(layer, args, kwargs)
        return value + changes[layer.name] if changes[layer.name] else value

    replay = Replay(graph, batches, call, lambda layer: changes[layer.name], **options)
    full = lambda: [graph.run(batch, call) for batch in batches]  # noqa: E731
    return graph, changes, replay, full


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [0, 500, 5_000, 1 << 30])
def test_any_sequence_of_changes_equals_full_runs_within_any_budget(max_bytes):
    graph, changes, replay, full = make(residual().eval(), (3, 12, 12), max_bytes=max_bytes)
    generator = torch.Generator().manual_seed(0)
    names = [layer.name for layer in graph if layer.is_float]
    for step in range(25):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        changes[name] = 0.0 if changes[name] else 0.1 * (step + 1)
        commit = step % 3 != 0
        assert all(torch.equal(a, b) for a, b in zip(replay.outputs(commit), full(), strict=True))
        assert replay.counts.bytes_kept <= max_bytes


@torch.no_grad()
def test_a_change_near_the_output_runs_only_what_is_downstream():
    graph, changes, replay, _ = make(chain(), (16,))
    replay.outputs()
    assert replay.counts.layer_calls == 3 * len(graph)
    changes["14"] = 1.0
    replay.outputs()
    assert replay.counts.layer_calls == 3 * len(graph) + 3 * 2
    replay.outputs()
    assert replay.counts.layer_calls == 3 * len(graph) + 3 * 2


@torch.no_grad()
def test_a_change_near_the_input_runs_the_full_forward_and_going_back_is_free():
    _, changes, replay, _ = make(chain(), (16,))
    replay.outputs()
    changes["0"] = 1.0
    replay.outputs()
    assert replay.counts.full_forwards == 3
    changes["0"] = 0.0
    before = replay.counts.layer_calls
    replay.outputs()
    assert replay.counts.layer_calls == before


@torch.no_grad()
def test_after_a_second_early_request_values_are_stored_anew():
    _, changes, replay, _ = make(chain(), (16,))
    replay.outputs()
    changes["0"] = 1.0
    replay.outputs()
    changes["2"] = 1.0
    replay.outputs()
    changes["14"] = 1.0
    before = replay.counts.layer_calls
    replay.outputs()
    assert replay.counts.layer_calls - before <= 3 * 4


@torch.no_grad()
def test_a_what_if_leaves_the_remembered_values_as_they_were():
    _, changes, replay, full = make(chain(), (16,))
    replay.outputs()
    changes["10"] = 1.0
    assert all(torch.equal(a, b) for a, b in zip(replay.outputs(commit=False), full(), strict=True))
    changes["10"] = 0.0
    before = replay.counts.layer_calls
    replay.outputs()
    assert replay.counts.layer_calls == before


@torch.no_grad()
@pytest.mark.parametrize("max_bytes", [0, 5_000, 1 << 30])
def test_what_would_change_can_be_named_instead_of_found(max_bytes):
    graph, changes, replay, full = make(residual().eval(), (3, 12, 12), max_bytes=max_bytes)
    before = replay.outputs()
    asked = []
    replay.fingerprint = asked.append  # which nobody needs then
    for name in [layer.name for layer in graph if layer.is_float]:
        changes[name] = 0.5
        dirty = graph.downstream([name])
        calls = replay.counts.layer_calls
        assert all(torch.equal(a, b) for a, b in zip(replay.outputs_if(dirty), full(), strict=True))
        if max_bytes == 1 << 30:
            assert replay.counts.layer_calls == calls + 3 * len(dirty)
        changes[name] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(replay.outputs_if(set()), before, strict=True))
    assert not asked


@torch.no_grad()
def test_the_value_of_one_layer_is_that_of_the_full_run():
    graph, _, replay, _ = make(chain(), (16,))
    want = {}
    graph.run(replay._batches[1].inputs, lambda layer, a, k: want.setdefault(layer.name, call_layer(layer, a, k)))
    assert torch.equal(replay.value(1, "5"), want["5"])


def test_forgetting_frees_what_was_kept():
    _, _, replay, full = make(chain(), (16,))
    with torch.no_grad():
        replay.outputs()
        assert replay.counts.bytes_kept > 0
        replay.forget()
        assert replay.counts.bytes_kept == 0
        assert all(torch.equal(a, b) for a, b in zip(replay.outputs(), full(), strict=True))
