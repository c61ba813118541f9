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
inputs, results = load_file(sys.argv[1]), {}
for path in sys.argv[3:]:
    model = torch.export.load(path).module()
    results |= {f"{path} {name}": model(x).contiguous() for name, x in inputs.items()}
save_file(results, sys.argv[2])
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


def test_a_fresh_process_loads_the_files_and_gives_the_same_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    sims = {str(tmp_path / f"{number}.pt2"): small(preset) for number, preset in enumerate(PRESETS)}
    for path, (sim, _) in sims.items():
        sim.export(path.removesuffix(".pt2"), formats=["program"])
    x = sims[str(tmp_path / "0.pt2")][1]
    inputs = {"all": x, "one": x[:1].clone()}
    save_file(inputs, tmp_path / "x")
    arguments = [str(tmp_path / "x"), str(tmp_path / "y"), *sims]
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, timeout=280)
    found = load_file(tmp_path / "y")
    for path, (sim, _) in sims.items():
        step = sim["softmax"].output.encoding.scale
        for name, value in inputs.items():
            steps = (found[f"{path} {name}"] - sim.output(value)).abs() / step
            if sim["softmax"].output.bits <= 8:
                assert (steps < 0.5).float().mean() > 0.95
            assert steps.max() < (1.5 if sim["softmax"].output.bits <= 8 else 16)


def test_the_sim_is_left_as_it_was():
    sim, x = small("w8a8")
    before, output = {k: v.clone() for k, v in sim.state_dict().items()}, sim.output(x)
    program(sim)
    assert all(torch.equal(before[key], value) for key, value in sim.state_dict().items())
    assert torch.equal(sim.output(x), output)
