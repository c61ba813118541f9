"""A model that cannot be captured is quantized module by module; what needs the graph says so in one sentence."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import CaptureError, InputError, NeedsCapture
from qlab.sim import Role


class Branching(nn.Module):
    """Convolutions with BatchNorm, a ReLU used twice, a residual sum, a branch on data and a module never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        self.fc, self.never = nn.Linear(8, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        y = self.relu(self.conv2(y) + y)
        if y.sum() < 0:
            y = self.never(y)
        return self.fc(self.pool(y).flatten(1))


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)) for _ in range(2)
    ]


@pytest.fixture
def model() -> nn.Module:
    return Branching().eval()


@pytest.fixture
def sim(model, data) -> qlab.QuantSim:
    sim = qlab.QuantSim(model, data[0], on_capture_failure="modules")
    sim.calibrate(data)
    return sim


def by_hand(model: nn.Module, sim: qlab.QuantSim, x: Tensor) -> Tensor:
    """The same with the sim's grids, by hooks on a copy of the user's model."""
    model = copy.deepcopy(model)
    model.relu.inplace = False
    hooks = [model.register_forward_pre_hook(lambda m, args: (sim["x"].output(args[0]),))]
    for name in ("conv", "conv2", "fc"):
        module = model.get_submodule(name)
        module.weight.data = sim[name].weight.quantized().detach()
    for name, layer in sim.layers.items():
        if layer.role is Role.QUANTIZED and layer.kind != "input":
            module = model.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda m, a, y, layer=layer: layer.output(y)))
    with torch.no_grad():
        return model(x)


def test_capture_fails_unless_asked_otherwise(model, data):
    with pytest.raises(CaptureError, match=r"torch\.where"):
        qlab.QuantSim(model, data[0])
    with pytest.raises(InputError, match="'raise' or 'modules'"):
        qlab.QuantSim(model, data[0], on_capture_failure="hooks")


def test_a_model_that_can_be_captured_is_captured(data):
    sim = qlab.QuantSim(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), data[0], on_capture_failure="modules")
    assert not sim.graph.runs_whole
    assert [layer.name for layer in sim.graph] == ["input", "0", "1"]


def test_modules_are_layers_and_what_lies_between_is_said_to_stay_float(sim):
    assert list(sim.layers) == ["x", "forward", "conv", "bn", "relu", "conv2", "pool", "fc", "never", "result"]
    assert sim["conv"].role is sim["bn"].role is Role.FUSED
    assert sim["conv2"].role is Role.QUANTIZED  # its result is added by code, so nothing is fused with it
    assert "could not be captured" in sim["forward"].reason
    assert "does not reach it" in sim["never"].reason
    assert "module by module" in repr(sim)
    assert set(sim.coverage()["layer"]) == set(sim.layers) - {"result"}


def test_a_module_whose_second_call_takes_a_later_layer_has_one_grid_for_all_calls():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.b(self.relu(self.a(x)))) if x.sum() != 0 else x

    x = torch.randn(4, 3)
    sim = qlab.QuantSim(Chain(), x, on_capture_failure="modules")
    sim.calibrate([x])
    assert [layer.name for layer in sim.graph["relu"].inputs] == ["a", "forward"]
    assert sim["relu"].role is sim["b"].role is Role.QUANTIZED
    assert sim(x).shape == (4, 2)


def test_off_it_is_the_float_model_bit_for_bit(sim, model, data):
    x = torch.randn(7, 3, 8, 8)
    before = copy.deepcopy(x)
    with sim.quantization_off(), torch.no_grad():
        assert torch.equal(sim(x), model(x))
    assert torch.equal(x, before)
    assert "forward" not in sim.model.conv.__dict__


def test_on_it_is_the_model_with_each_modules_weight_and_output_rounded(sim, model, data):
    with torch.no_grad():
        assert torch.equal(sim(data[1][0]), by_hand(model, sim, data[1][0]))


def test_a_change_of_one_layer_changes_the_score(sim, data):
    before = float(sim.evaluate(qlab.SQNR(data)))
    sim["conv2"].weight.bits = 3
    assert float(sim.evaluate(qlab.SQNR(data))) < before - 5
    sim.configure("conv2", weight={"bits": 8})
    assert float(sim.evaluate(qlab.SQNR(data))) == before


def test_saved_copied_and_loaded_it_computes_the_same(sim, model, data, tmp_path):
    sim["fc"].weight.bits = 5
    sim.save(tmp_path / "sim.safetensors")
    loaded = qlab.load(tmp_path / "sim.safetensors", model, data[0])
    twin = copy.deepcopy(sim)
    with torch.no_grad():
        want = sim(data[0][0])
        assert torch.equal(loaded(data[0][0]), want)
        twin.model.fc.weight.zero_()
        assert torch.equal(sim(data[0][0]), want)
        assert not torch.equal(twin(data[0][0]), want)


def test_two_threads_run_one_sim_at_once(sim, data):
    with torch.no_grad():
        want, x = sim(data[0][0]), data[0][0]
        with sim.quantization_off():
            exact = sim(x)

        def run(number: int) -> bool:
            with torch.no_grad():
                result = sim.graph.run([x], sim.call if number % 2 else None)
            return torch.equal(result, want if number % 2 else exact)

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(run, range(40)))
    assert "forward" not in sim.model.conv.__dict__


def test_replay_runs_again_only_after_a_change(sim, data):
    from qlab.graph import Replay

    replay = Replay(sim.graph, [sim.inputs(data[0])], sim.call, sim.fingerprint)
    with torch.no_grad():
        first = replay.output(0)
        assert torch.equal(replay.output(0), first)
        assert replay.counts.full_forwards == 1
        sim["conv"].weight.bits = 3
        assert torch.equal(replay.output(0), sim(data[0][0]))
        assert torch.equal(replay.value(0, "fc"), replay.output(0))


def test_it_trains(sim, data):
    before = sim.model.fc.weight.detach().clone()
    qlab.QAT(epochs=1).apply(sim, data)
    assert not torch.equal(before, sim.model.fc.weight)


@pytest.mark.parametrize(
    "technique", ["BatchNormFolding", "CrossLayerEqualization", "BiasCorrection", "AdaRound", "GPTQ", "SequentialMSE"]
)
def test_a_technique_that_needs_the_graph_says_so_and_changes_nothing(technique, sim, data):
    with torch.no_grad():
        want = sim(data[0][0])
    with pytest.raises(
        NeedsCapture, match=rf"^{technique} is off for this sim: which layer feeds which.*test_capture_"
    ):
        getattr(qlab, technique)().apply(sim, data)
    with torch.no_grad():
        assert torch.equal(sim(data[0][0]), want)


def test_analysis_and_export_say_that_they_are_off(sim, data, tmp_path):
    with pytest.raises(NeedsCapture, match=r"^QuantAnalyzer is off"):
        qlab.QuantAnalyzer().measure(sim, data)
    with pytest.raises(NeedsCapture, match=r"^Export is off"):
        sim.export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_lab_edits_measures_undoes_and_writes_a_script_that_makes_it_again(sim, model, data):
    lab = qlab.Lab(sim, data, score=qlab.Accuracy(data))
    lab.measure().result(timeout_s=60)
    noise = lab.noise
    assert {"conv", "bn", "relu", "conv2", "fc"} <= set(noise)
    lab.set("conv", "weight", bits=4)
    lab.measure().result(timeout_s=60)
    assert lab.noise["conv"] < noise["conv"] - 10
    lab.undo()
    assert sim["conv"].weight.bits == 8
    lab.redo()
    names = {"model": model, "example": data[0], "batches": data}
    exec(lab.script(), names)
    with torch.no_grad():
        assert torch.equal(names["sim"](data[0][0]), sim(data[0][0]))


def test_several_inputs_and_nested_results_pass_through(data):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> dict[str, object]:
            y = self.a(x) if float(x.sum()) != 0 else x
            return {"y": y * scale, "more": (self.lstm(y)[0], extra)}

    net = Two().eval()
    x = torch.randn(2, 5, 4)
    sim = qlab.QuantSim(net, {"x": x, "scale": 2.0}, on_capture_failure="modules")
    sim.calibrate([{"x": x, "scale": 2.0}])
    assert sim["lstm"].role is Role.FLOAT
    with sim.quantization_off(), torch.no_grad():
        want, have = net(x, 2.0), sim(x=x, scale=2.0)
    assert torch.equal(want["y"], have["y"])
    assert torch.equal(want["more"][0], have["more"][0])
    with pytest.raises(InputError, match=r"'scale' was captured as 2\.0"):
        sim(x=x, scale=3.0)
