"""The heat map shows the range of every channel as the weights have it; a click shows that channel alone."""

import numpy as np
import pytest
import torch
from torch import nn

import qlab
from qlab.errors import SpecError
from qlab.views import Channels, channels


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    with torch.no_grad():
        model[2].weight[1] *= 50
    batches = [torch.randn(4, 3, 8, 8)]
    return qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)


def drawn(view: Channels) -> dict[tuple[str, int], float]:
    data = view._figure.source.data
    return dict(zip(zip(data["layer"], map(int, data["channel"]), strict=True), data["value"], strict=True))


def test_every_channel_has_the_width_of_its_weights(lab):
    view = Channels(lab)
    found = drawn(view)
    for name, layer in lab.sim.model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rows = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
            widths = rows.max(1) - rows.min(1)
            assert [found.pop((name, channel)) for channel in range(len(rows))] == pytest.approx(widths.tolist())
    assert not found
    view.close()


def test_a_click_selects_the_layer_and_shows_the_channel(lab):
    view = Channels(lab)
    place = list(drawn(view)).index(("2", 1))
    view._figure.source.selected.indices = [place]
    assert lab.selected == ("2",)
    assert (view.histogram.layer, view.histogram.part, view.histogram.channel) == ("2", "weight", 1)
    view._part.value = "output"
    layer, channel = list(drawn(view))[5]
    view._figure.source.selected.indices = [5]
    assert lab.selected == (layer,)
    assert (view.histogram.layer, view.histogram.part, view.histogram.channel) == (layer, "output", None)
    assert f"channel {channel}: this output has no histogram per channel" in view._said.value
    view.close()


def test_it_follows_what_a_technique_changes(lab):
    view = Channels(lab)
    before = drawn(view)
    lab.run(qlab.CrossLayerEqualization())
    after = drawn(view)
    assert after.keys() == before.keys()
    spread = [max(found[key] for key in found if key[0] == "2") for found in (before, after)]
    assert not np.isclose(*spread)
    lab.undo()
    assert drawn(view) == pytest.approx(before)
    view.close()


def test_of_many_layers_those_are_shown_whose_channels_differ_most(lab, monkeypatch):
    monkeypatch.setattr(channels, "SHOWN_LAYERS", 1)
    view = Channels(lab)
    assert {layer for layer, _ in drawn(view)} == {"2"}
    assert "The 1 of 3 layers" in view._said.value
    view.close()


def test_a_part_that_there_is_not_is_refused(lab):
    with pytest.raises(SpecError, match="'weight' or 'output'"):
        lab.channels("bias")
