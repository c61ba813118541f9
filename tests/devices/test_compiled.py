"""sim.compile(): the sim's results from compiled kernels, or a sentence that says what is missing."""

import copy
import shutil

import pytest
import torch

import qlab
from qlab.errors import InputError
from tests.devices.test_devices import BATCHES, Small

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(scope="module")
def sim() -> qlab.QuantSim:
    torch.manual_seed(0)
    sim = qlab.QuantSim(Small().eval(), BATCHES[0], qlab.presets.w4a8(per_channel=True))
    sim.calibrate(BATCHES)
    return sim


@needs_compiler
@pytest.mark.slow
def test_the_compiled_sim_equals_the_sim_as_it_was(sim, device):
    sim = copy.deepcopy(sim).to(device)
    sim["conv"].weight.set_bias_correction(torch.linspace(-1, 1, 8, device=device))
    sim["conv"].output.set_range(-0.5, 1.5)
    compiled, want = sim.compile(), sim.output(BATCHES[0])
    sim["conv"].weight.bits = 2
    have = compiled(BATCHES[0].to(device))
    step = sim["fc"].output.required_encoding().scale
    apart = (have - want).abs() / step
    assert float(apart.max()) < 1.5  # a value on the edge of a step may be rounded to its neighbour
    assert float((apart < 0.1).float().mean()) >= 0.95
    assert float((sim.output(BATCHES[0]) - want).abs().max()) > 3 * step
    assert not have.requires_grad


def test_straight_code_is_that_of_the_sim_bit_for_bit_before_it_is_compiled(sim, device, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    sim = copy.deepcopy(sim).to(device)
    for change in (
        lambda: None,
        lambda: sim.configure("depthwise", output={"enabled": False}, weight={"enabled": False}),
        lambda: qlab.BatchNormFolding().apply(sim),
        lambda: sim["fc"].output.set(granularity="per_channel", rule="min_max"),
    ):
        change()
        assert torch.equal(sim.compile()(BATCHES[0].to(device)), sim.output(BATCHES[0]))
        assert sim.compile()(BATCHES[0][:3].to(device)).shape == (3, 5)
    with sim.quantization_off():
        assert torch.equal(sim.compile()(BATCHES[0].to(device)), sim.float_output(BATCHES[0]))


def test_without_a_compiler_it_is_said_what_to_install(sim, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler.*g\+\+"):
        sim.compile()
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(InputError, match="my-compiler"):
        sim.compile()


def test_integer_biases_are_refused():
    sim = qlab.QuantSim(Small().eval(), BATCHES[0], qlab.presets.w8a8(int32_bias=True))
    with pytest.raises(InputError, match="int32_bias"):
        sim.compile()
