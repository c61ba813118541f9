"""The torch.export program: loaded in a fresh process without qlab, it gives the sim's numbers for any batch size."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import qlab
from qlab.export.program import program

RUN = """
import sys
sys.modules["qlab"] = None  # importing it now fails
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[2])
model = torch.export.load(sys.argv[1]).module()
save_file({name: model(x).contiguous() for name, x in inputs.items()}, sys.argv[3])
"""


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.fc = nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        x = self.up(self.conv(x).relu())
        return torch.softmax(self.tied(self.fc(torch.cat([x, x * 2], 1).mean((2, 3)))), -1)


PRESETS = {
    "w8a8": (qlab.presets.w8a8(), {}),
    "w4a16 by channel": (qlab.presets.w8a16(per_channel=True), {"bits": 4}),
    "w4a8 in blocks": (qlab.presets.w4a8(), {"granularity": "per_block(4)"}),
}


def small(preset):
    torch.manual_seed(0)
    x = torch.randn(16, 1, 6, 6)
    sim = qlab.QuantSim(Small(), x, PRESETS[preset][0])
    sim.configure("*", weight=PRESETS[preset][1])
    sim.calibrate([x])
    return sim, x


@pytest.mark.parametrize("preset", PRESETS)
def test_it_computes_what_the_sim_does_and_holds_integers_under_the_users_names(preset):
    sim, x = small(preset)
    exported = program(sim)
    steps = (exported.module()(x) - sim.output(x)).abs() / sim["softmax"].output.encoding.scale
    assert (steps < 0.5).float().mean() > 0.95
    state = exported.state_dict
    for name in ("conv", "up", "fc"):
        weight = sim[name].weight
        stored = state[f"model.{name}.weight"]
        assert not stored.is_floating_point()
        assert torch.equal(stored.int(), qlab.quantization.quantize(weight.weight.detach(), weight.encoding))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("quantize_per_tensor" in name for name in operators)


def test_a_fresh_process_loads_the_file_and_gives_the_same_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    sim, x = small("w8a8")
    sim.export(tmp_path / "m", formats=["program"])
    save_file({"all": x, "one": x[:1].clone()}, tmp_path / "x")
    arguments = [tmp_path / "m.pt2", tmp_path / "x", tmp_path / "y"]
    subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], check=True, timeout=280)
    found = load_file(tmp_path / "y")
    step = sim["softmax"].output.encoding.scale
    for name, wanted in (("all", sim.output(x)), ("one", sim.output(x[:1]))):
        assert ((found[name] - wanted).abs() < step / 2).float().mean() > 0.95


def test_the_sim_is_left_as_it_was():
    sim, x = small("w8a8")
    before, output = {k: v.clone() for k, v in sim.state_dict().items()}, sim.output(x)
    program(sim)
    assert all(torch.equal(before[key], value) for key, value in sim.state_dict().items())
    assert torch.equal(sim.output(x), output)
