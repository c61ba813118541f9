"""AIMET configurations as presets: the recorded ones give the recorded sim, each setting does what it says."""

import copy
import json

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.quantization import Scheme
from qlab.sim import Role
from tests.reference import GRANULARITIES, RECORDED, Reference, recorded

CONFIG = json.loads((RECORDED / "config_per_channel.json").read_text())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_recorded_configuration_gives_the_recorded_sim(granularity):
    preset = qlab.presets.from_aimet(RECORDED / f"config_{granularity}.json")
    sim = qlab.QuantSim(Reference(), recorded()["input"], preset)
    sim.calibrate([recorded()["input"]])
    step = sim["fc"].output.encoding.scale.item()
    wanted = recorded()[f"sim_output_{granularity}"]
    torch.testing.assert_close(sim.output(recorded()["input"]), wanted, rtol=0, atol=step * 1e-3)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc, self.softmax = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(self.fc(self.relu(self.conv(x)).flatten(1) * 2))


def sim_of(tmp_path, **changes):
    """A sim of Small with the recorded configuration, its sections changed by dotted path."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        section = config
        *parents, last = path.split("__")
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return qlab.QuantSim(Small(), torch.randn(2, 2, 4, 4), qlab.presets.from_aimet(tmp_path / "config.json"))


def test_truth_may_be_written_as_text_or_as_a_value(tmp_path):
    for value in ("False", False):
        sim = sim_of(tmp_path, model_input__is_input_quantized=value)
        assert sim["x"].role is Role.FLOAT


def test_operators_are_off_unless_asked_for_and_single_ones_can_be_switched_on(tmp_path):
    sim = sim_of(tmp_path, defaults__ops={}, op_type__Gemm={"is_output_quantized": "True"})
    assert {name for name, layer in sim.layers.items() if layer.role is Role.QUANTIZED} == {"x", "fc"}
    sim = sim_of(tmp_path, op_type__Mul={"is_output_quantized": "False"})
    assert sim["mul"].role is Role.FLOAT


def test_parameters_are_off_where_they_are_not_asked_for(tmp_path):
    sim = sim_of(tmp_path, defaults__params={}, op_type={"Conv": {"params": {"weight": {"is_quantized": "True"}}}})
    assert sim["conv"].weight is not None
    assert sim["fc"].weight is None
    sim = sim_of(tmp_path, params__weight={"is_quantized": "False"})
    assert sim["conv"].weight is None


@pytest.mark.parametrize(
    ("flag", "scheme"),
    [("strict_symmetric", Scheme.STRICT_SYMMETRIC), ("unsigned_symmetric", Scheme.UNSIGNED_SYMMETRIC)],
)
def test_strict_and_unsigned_symmetric_grids_are_taken_over(tmp_path, flag, scheme):
    changes = {f"defaults__{flag}": "True", "defaults__ops__is_symmetric": "True"}
    sim = sim_of(tmp_path, **changes)
    assert sim["fc"].weight.scheme is scheme
    assert sim["fc"].output.scheme is scheme
    sim.calibrate([torch.randn(8, 2, 4, 4)])
    grid = sim["relu"].output.encoding
    limits = {"strict_symmetric": (-127, 127), "unsigned_symmetric": (0, 255)}
    assert (grid.qmin, grid.qmax) == limits[flag]


def test_an_operator_has_its_own_symmetry_granularity_and_limits(tmp_path):
    sim = sim_of(
        tmp_path,
        op_type__Conv={"per_channel_quantization": "False", "params": {"weight": {"is_symmetric": "False"}}},
        op_type__Gemm={"is_symmetric": "True", "per_channel_quantization": "True"},
        op_type__Softmax={"encoding_constraints": {"min": 0.0, "max": 0.5}},
    )
    assert (str(sim["conv"].weight.granularity), sim["conv"].weight.scheme) == ("per_tensor", Scheme.ASYMMETRIC)
    assert (str(sim["fc"].weight.granularity), sim["fc"].output.scheme) == ("per_channel", Scheme.SYMMETRIC)
    assert sim["softmax"].output.encoding.maximum.item() == pytest.approx(0.5)


def test_supergroups_are_those_of_the_file(tmp_path):
    assert sim_of(tmp_path)["conv"].role is Role.FUSED
    assert sim_of(tmp_path, supergroups=[])["conv"].role is Role.QUANTIZED


def test_outputs_stay_in_float_where_the_file_says_so(tmp_path):
    assert sim_of(tmp_path)["softmax"].role is Role.QUANTIZED
    assert sim_of(tmp_path, model_output__is_output_quantized="False")["softmax"].role is Role.FLOAT


def test_a_quantized_bias_is_int32(tmp_path):
    assert not sim_of(tmp_path).preset.int32_bias
    assert sim_of(tmp_path, params__bias={"is_quantized": "True"}).preset.int32_bias


def test_settings_without_a_counterpart_are_named(tmp_path):
    sim = sim_of(tmp_path, op_type__Mul={"is_input_quantized": "True"}, shape="round")
    for word in ("'is_input_quantized' of op_type.Mul", "'shape' of the file", "MatmulAdd"):
        assert word in sim.preset.advice


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "must hold an object"),
        ('{"defaults": []}', "'defaults' must be an object"),
        ('{"defaults": {"strict_symmetric": "perhaps"}}', "'strict_symmetric' must be true or false"),
        ('{"op_type": {"Conv": 3}}', "op_type.Conv must be an object"),
        ('{"supergroups": [{"op_list": "Conv"}]}', "op_list"),
        ('{"op_type": {"Softmax": {"encoding_constraints": {"min": NaN, "max": 1}}}}', "must be a number"),
        ('{"op_type": {"Softmax": {"encoding_constraints": {"min": 2, "max": 1}}}}', "low < high"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, content, sentence):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((InputError, qlab.errors.SpecError), match=sentence):
        qlab.presets.from_aimet(tmp_path / "config.json")
