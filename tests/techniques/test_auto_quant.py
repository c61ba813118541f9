"""AutoQuant: the best of what was tried, every failure a verdict, nothing of the person's changed, nothing lost."""

import copy
import math
import threading
import time

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import Cancelled, InputError
from qlab.settings import SettingError
from qlab.techniques import StageRecord
from qlab.techniques.auto_quant import RULES
from tests.techniques.models import lived

FEW = ("CrossLayerEqualization", "BiasCorrection")
WORDS = {"reference", "target met", "effective", "discarded", "failed", "vetoed", "forced"}


def network() -> nn.Module:
    """Two pairs that can be equalized and need it: channels differ by three orders of magnitude."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
        nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4, bias=False),
    )  # fmt: skip
    return qlab.examples.rescale(lived(model), (0.03, 30.0))


def data(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 2, 8, 8, generator=generator) for _ in range(count)]


def quantized(preset: str = "w4a8") -> qlab.QuantSim:
    sim = qlab.QuantSim(network(), data()[0], getattr(qlab.presets, preset)())
    sim.calibrate(data())
    return sim


@pytest.fixture(scope="module")
def sim() -> qlab.QuantSim:
    return quantized()


class Listening:
    """A progress that keeps what is published and calls `at(text)` at each step."""

    def __init__(self, at=lambda text: None) -> None:
        self.records: list[StageRecord] = []
        self.steps: list[tuple[int, int]] = []
        self._at = at

    def step(self, done: int, total: int, text: str = "") -> None:
        self.steps.append((done, total))
        self._at(text)

    def publish(self, record: object) -> None:
        if isinstance(record, StageRecord):
            self.records.append(record)


def auto(**settings) -> qlab.AutoQuant:
    return qlab.AutoQuant(**{"techniques": FEW, **settings})


def verdicts(result) -> dict[str, str]:
    return dict(zip(result.stages.stage, result.stages.verdict, strict=True))


# What it finds ----------------------------------------------------------------------------------------------------


def test_the_best_stage_is_the_result_and_its_score_is_true(sim):
    judge, before = qlab.SQNR(data()), sim.output(data()[0]).clone()
    result = auto().apply(sim, data(), score=judge)
    stages = result.stages
    scored = stages[stages.verdict != "reference"]
    assert result.best.score == pytest.approx(scored.score.max())
    assert float(result.sim.evaluate(judge)) == pytest.approx(result.best.score)
    assert result.best.score > float(sim.evaluate(judge)) + 6  # dB: equalization is worth a bit and more here
    assert torch.equal(sim.output(data()[0]), before)
    assert result.sim is not sim
    assert set(stages.verdict) <= WORDS
    assert stages.parent.dropna().isin(stages.stage).all()
    assert stages.stage.is_unique


def test_it_is_at_least_as_good_as_each_technique_alone(sim):
    judge = qlab.SQNR(data())
    best = auto().apply(sim, data(), score=judge).best.score
    for technique in (qlab.BatchNormFolding(), qlab.CrossLayerEqualization(), qlab.BiasCorrection()):
        alone = copy.deepcopy(sim)
        technique.apply(alone, data())
        assert best >= float(alone.evaluate(judge)) - 1e-6


def test_gains_are_against_the_parent_and_intervals_hold_the_score(sim):
    stages = auto().apply(sim, data(), score=qlab.SQNR(data())).stages.set_index("stage")
    for stage, row in stages.iterrows():
        if row.parent is not None and stage != "BatchNormFolding":
            assert row.gain == pytest.approx(row.score - stages.score[row.parent])
        if math.isfinite(row.low):
            assert row.low <= row.score <= row.high
    assert stages.is_best[["as given", "CrossLayerEqualization"]].all()


def test_it_stops_when_the_target_is_met_unless_asked_to_go_on():
    sim = quantized("w8a16")
    judge = qlab.Agreement(data())
    first = auto(allowed_drop=1.0).apply(sim, data(), score=judge)
    assert verdicts(first) == {"float": "reference", "as given": "target met"}
    assert first.is_target_met
    whole = auto(allowed_drop=1.0, stop_at_target=False).apply(sim, data(), score=judge)
    assert len(whole.stages) > 8


def test_the_data_are_not_read_again_for_another_pair_of_rules(sim):
    class Counted(list):
        read = 0

        def __iter__(self):
            Counted.read += 1
            return super().__iter__()

    read, stages = [], []
    for rules in (RULES[:1], RULES):
        Counted.read = 0
        result = auto(techniques=(), rules=rules).apply(sim, Counted(data()), score=qlab.SQNR(data()))
        read.append(Counted.read)
        stages.append(len(result.stages))
    assert stages[1] > stages[0]
    assert read[1] == read[0]


def test_equal_scores_are_told_apart_by_sqnr(sim):
    class Blind(qlab.Agreement):
        def tally(self, sim, number, batch, output):
            return torch.ones(len(output), 2, dtype=torch.float64)

    result = auto(target=1.0, stop_at_target=False).apply(sim, data(), score=Blind(data()))
    assert result.best.sqnr == result.stages.sqnr.max()


def test_scores_within_their_error_are_told_apart_by_sqnr_when_asked_for(sim):
    class Coarse(qlab.Agreement):
        """States scored early gain a sample by luck."""

        scored = 0

        def of_tallies(self, rows):
            self.scored += 1
            share = 0.9 if self.scored in (1, 2, 4) else 0.89
            return qlab.Measurement(share, 0.03, "share", 100)

    settings = {"target": 0.899, "stop_at_target": False}
    by_score = auto(**settings).apply(sim, data(), score=Coarse(data()))
    closest = auto(**settings, within_error=True).apply(sim, data(), score=Coarse(data()))
    assert by_score.best.score == 0.9
    assert any("closer to the float model" in note for note in by_score.notes)
    assert closest.best.score == 0.89
    assert closest.best.sqnr == closest.stages.sqnr.max() > by_score.best.sqnr + 3


def test_an_error_of_the_progress_or_of_the_data_is_no_stage_s_failure(sim):
    def at(text: str) -> None:
        if text.startswith("CLE, mse"):
            raise ZeroDivisionError("the view is gone")

    with pytest.raises(ZeroDivisionError):
        auto().apply(sim, data(), score=qlab.SQNR(data()), progress=Listening(at))
    with pytest.raises(InputError):
        auto().apply(sim, [*data(), data()[0][:, :1]], score=qlab.SQNR(data()))


def test_mixed_precision_and_training_join_when_asked_for(sim):
    labelled = [(x, torch.randint(0, 4, (16,))) for x in data()]
    techniques = (*FEW, "MixedPrecision", qlab.QAT(epochs=1, learning_rate=1e-4))
    result = auto(techniques=techniques).apply(sim, data(), score=qlab.SQNR(data()), labelled=labelled)
    assert {"MixedPrecision", "QAT"} <= set(result.stages.stage)
    size = sum(layer.weight.bits * layer.weight.weight.numel() for layer in result.sim.layers.values() if layer.weight)
    given = sum(layer.weight.bits * layer.weight.weight.numel() for layer in sim.layers.values() if layer.weight)
    assert size <= given  # only named, mixed precision keeps the size
    named = auto().apply(sim, data(), score=qlab.SQNR(data()), labelled=labelled)
    assert "QAT" in set(named.stages.stage)


def test_a_model_is_captured_and_calibrated_first_and_never_changed():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = auto().apply(model, data(), preset=qlab.presets.w4a8())
    assert result.score_name == "agreement"
    assert result.stages.stage[0] == "validate"
    assert result.stages.verdict[0] == "reference"
    assert [finding.code for finding in qlab.validate(model, data()[0], qlab.presets.w4a4())] == [
        finding.code for finding in result.findings
    ]
    assert "not calibrated" in result.stages.set_index("stage").reason["as given"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="preset"):
        auto().apply(result.sim, data(), preset=qlab.presets.w8a8())


def test_a_model_that_prepare_mends_is_prepared_first_as_a_copy(tmp_path):
    class Reused(nn.Module):
        """One BatchNorm after two convolutions, so that it cannot be folded, and dropout as a function."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.bn = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn(self.second(torch.relu(self.bn(self.first(x))))))
            return self.head(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))

    torch.manual_seed(0)
    model = Reused().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {finding.code for finding in qlab.validate(model, data()[0])}
    assert {"QL201", "QL203"} <= given
    plain = auto().apply(qlab.QuantSim(model, data()[0]), data(), score=qlab.SQNR(data()))
    result = auto().apply(model, data(), score=qlab.SQNR(data()))
    first = result.stages.iloc[0]
    assert first.stage == "validate"
    assert first.verdict == "reference"
    assert first.reason.startswith("prepared a copy, which mends ")
    assert "'bn' is called 2 times" in first.reason
    assert "dropout with p=0.5 is a function" in first.reason
    assert {finding.code for finding in result.findings} == given  # of the model as it was given
    assert verdicts(plain)["BatchNormFolding"] == "discarded"
    assert verdicts(result)["BatchNormFolding"] == "effective"  # each call has a module that can be folded
    assert any("qlab.prepare(model, example)" in note for note in result.notes)
    with result.sim.quantization_off(), torch.no_grad():
        assert (result.sim(data()[0]) - model(data()[0])).abs().max() < 1e-5  # folding rounds anew
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "bn_1")
    result.sim.save(tmp_path / "sim.safetensors")
    loaded = qlab.load(tmp_path / "sim.safetensors", qlab.prepare(model, data()[0]), data()[0])
    assert torch.equal(loaded.output(data()[0]), result.sim.output(data()[0]))


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["raises", "nan"])
def test_a_score_that_fails_in_some_stages_marks_them_and_the_rest_goes_on(sim, bad):
    judge, calls = qlab.SQNR(data()), []

    def score(model) -> float:
        calls.append(1)
        if len(calls) in (5, 9):
            if bad == "nan":
                return math.nan
            raise RuntimeError("the dataset is locked")
        value = float(judge.of_model(model))
        return min(value, 100.0)

    result = auto().apply(sim, data(), score=score)
    stages = result.stages
    failed = stages[stages.verdict == "failed"]
    assert len(failed) == 2
    assert failed.reason.str.contains("locked" if bad == "raises" else "NaN").all()
    assert result.best.verdict == "effective"
    assert math.isfinite(result.best.score)
    assert len(stages) > 9


def test_a_score_that_fails_everywhere_but_in_float_still_gives_a_sim(sim):
    calls = []

    def score(model) -> float:
        calls.append(1)
        return 1.0 if len(calls) == 1 else math.nan

    result = auto().apply(sim, data(), score=score)
    assert result.best is None
    assert "no stage could be scored" in result.summary
    assert torch.equal(result.sim.output(data()[0]), sim.output(data()[0]))


def test_a_score_that_fails_in_float_or_a_target_above_it_is_an_error(sim):
    with pytest.raises(InputError, match=r"score \(broken\) failed on the float model: KeyError"):
        auto().apply(sim, data(), score=qlab.Score(lambda model: {}["x"], "broken"))
    with pytest.raises(InputError, match="NaN"):
        auto().apply(sim, data(), score=lambda model: math.nan)
    with pytest.raises(InputError, match="above the float model's own score"):
        auto(target=1.5).apply(sim, data(), score=qlab.Agreement(data()))


def test_no_data_and_folders_that_cannot_be_written_are_said_before_the_work(sim, tmp_path):
    scored = []
    (tmp_path / "file").write_text("")
    for settings in ({"save_dir": str(tmp_path / "file" / "in")}, {"resume_dir": str(tmp_path / "file")}):
        with pytest.raises(InputError, match="cannot write into"):
            auto(**settings).apply(sim, data(), score=lambda model: scored.append(1) or 1.0)
    for nothing in (None, []):
        with pytest.raises(InputError, match="AutoQuant needs"):
            auto().apply(sim, nothing)
    with pytest.raises(SettingError, match=r"knows .*BiasCorrection.* got 'AdaRond'"):
        auto(techniques="CrossLayerEqualization, AdaRond").apply(sim, data())
    assert not scored


def test_a_model_that_cannot_be_captured_gives_findings_and_no_traceback():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    result = auto().apply(Branching(), [torch.randn(2, 3)])
    assert result.sim is None
    assert result.best is None
    assert verdicts(result) == {"validate": "failed"}
    assert "cannot be captured" in result.summary
    assert "cannot be captured" in result._repr_html_()
    assert not result.findings.ok
    assert __file__.rpartition("/")[2] in result.findings[0].location  # the line of the branch, not of qlab
    assert result.findings[0].code in result._repr_html_()
    with pytest.raises(InputError, match="found no sim"):
        result.save("nowhere")


def test_a_model_that_fails_on_the_example_gives_findings_and_no_traceback():
    result = auto().apply(nn.Linear(3, 2), [torch.randn(2, 5)])
    assert result.sim is None
    assert verdicts(result) == {"validate": "failed"}
    assert "mat1 and mat2" in result.summary
    assert not result.findings.ok
    with pytest.raises(InputError, match="found no sim"):
        result.adopt(quantized())


# Steering -----------------------------------------------------------------------------------------------------------


def test_vetoed_stages_do_not_run_and_forced_ones_are_part_of_the_result(sim):
    steering = qlab.Steering(veto=["CrossLayerEqualization"], force=["sqnr / sqnr"])
    result = auto(steering=steering).apply(sim, data(), score=qlab.SQNR(data()))
    told = verdicts(result)
    assert told["CrossLayerEqualization"] == "vetoed"
    assert told["sqnr / sqnr"] == "forced"
    assert "sqnr / sqnr" in result.lineage
    assert not any("CLE" in stage for stage in told)
    assert str(result.sim["0"].weight.rule) == "sqnr"


def test_a_stage_is_vetoed_while_it_runs_and_after_it_ran(sim):
    steering = qlab.Steering()

    def at(text: str) -> None:
        if text.startswith("BiasCorrection"):
            thread = threading.Thread(target=steering.veto, args=("BiasCorrection",))
            thread.start()
            thread.join()
        if text.startswith("CLE, sqnr"):
            steering.veto("CrossLayerEqualization")

    result = auto(steering=steering, finalists=1).apply(sim, data(), score=qlab.SQNR(data()), progress=Listening(at))
    told = verdicts(result)
    assert told["BiasCorrection"] == "vetoed"
    assert told["CrossLayerEqualization"] == "vetoed"
    assert told["CLE, mse / mse"] == "vetoed"
    assert "CrossLayerEqualization" not in result.lineage
    assert result.best.verdict != "vetoed"


def test_each_stage_is_published_when_it_starts_and_when_it_ends(sim):
    heard = Listening()
    result = auto().apply(sim, data(), score=qlab.SQNR(data()), progress=heard)
    for stage, verdict in verdicts(result).items():
        if verdict == "reference":
            continue
        told = [record.verdict for record in heard.records if record.stage == stage]
        assert told[0] == "running"
        assert told[-1] == verdict
    assert all(record.steering is not None for record in heard.records)
    shares = [done / total for done, total in heard.steps]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1


# Ending early and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Cancelled("stop"), KeyboardInterrupt()])
def test_cancel_returns_the_best_so_far_or_raises_as_asked(sim, kind):
    def at(text: str) -> None:
        if text.startswith("CLE, mse / mse"):
            raise kind

    result = auto().apply(sim, data(), score=qlab.SQNR(data()), progress=Listening(at))
    assert result.cancelled
    assert result.best.stage in ("CrossLayerEqualization", "CLE, mse / min_max")
    assert float(result.sim.evaluate(qlab.SQNR(data()))) == pytest.approx(result.best.score)
    with pytest.raises(type(kind)):
        auto(on_cancel="raise").apply(sim, data(), score=qlab.SQNR(data()), progress=Listening(at))


def test_what_a_person_steered_and_ended_can_be_done_again_from_its_settings(sim):
    steering = qlab.Steering()

    def at(text: str) -> None:
        if text.startswith("CLE, sqnr"):
            steering.veto("CLE, mse / min_max")
            steering.force("mse / mse")
        if text.startswith("BiasCorrection"):
            raise Cancelled("stop")

    first = auto(steering=steering).apply(sim, data(), score=qlab.SQNR(data()), progress=Listening(at))
    assert first.as_done.steering is None
    assert (first.as_done.veto, first.as_done.force) == (("CLE, mse / min_max",), ("mse / mse",))
    again = first.as_done.apply(sim, data(), score=qlab.SQNR(data()))
    assert again.best.stage == first.best.stage
    assert torch.equal(again.sim.output(data()[0]), first.sim.output(data()[0]))
    assert not again.cancelled
    assert auto().apply(sim, data(), score=qlab.SQNR(data())).as_done is None


def test_a_steered_search_in_a_lab_is_a_step_that_the_script_can_write():
    plain = qlab.QuantSim(network(), data()[0], qlab.presets.w4a8())
    lab = qlab.Lab(plain, data(), score=qlab.SQNR(data()))
    steering = qlab.Steering(veto=["CrossLayerEqualization"])
    lab.run(auto(steering=steering, techniques=("CrossLayerEqualization",)))
    assert "veto=('CrossLayerEqualization',)" in lab.script()
    assert "NotImplementedError" not in lab.script()
    names = {"qlab": qlab, "model": network(), "example": data()[0], "batches": data(), "score": qlab.SQNR(data())}
    exec(lab.script(), names)  # the lab's own text
    assert torch.equal(names["sim"].output(data()[0]), lab.sim.output(data()[0]))


def test_a_spent_time_budget_ends_with_what_there_is(sim):
    def slow(model) -> float:
        time.sleep(0.05)
        return float(qlab.SQNR(data(1)).of_model(model)) if model.quantization_enabled else 99.0

    result = auto(time_budget_s=0.01).apply(sim, data(), score=slow)
    assert verdicts(result)["as given"] == "effective"
    assert any("time budget" in note for note in result.notes)
    assert len(result.stages) < 6


class Counting(qlab.SQNR):
    """Counts how often it was asked to score a whole state."""

    calls = 0

    def of_tallies(self, rows):
        type(self).calls += 1
        return super().of_tallies(rows)


def test_an_interrupted_run_goes_on_from_disk_and_ends_as_an_unbroken_one(sim, tmp_path):
    def at(text: str) -> None:
        if text.startswith("BiasCorrection"):
            raise Cancelled("stop")

    whole = auto().apply(sim, data(), score=Counting(data()))
    auto(resume_dir=str(tmp_path)).apply(sim, data(), score=Counting(data()), progress=Listening(at))
    Counting.calls = 0
    resumed = auto(resume_dir=str(tmp_path)).apply(sim, data(), score=Counting(data()))
    assert Counting.calls <= 2 + 2  # float, weights in float, and the finalists' bias correction
    assert verdicts(resumed) == verdicts(whole)
    assert resumed.best.stage == whole.best.stage
    assert torch.equal(resumed.sim.output(data()[0]), whole.sim.output(data()[0]))
    assert len(resumed.sim.log) == len(whole.sim.log)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damaged_files_are_computed_again(sim, tmp_path, suffix):
    settings = {"resume_dir": str(tmp_path)}
    first = auto(**settings).apply(sim, data(), score=qlab.SQNR(data()))
    files = sorted(tmp_path.glob(f"*.{suffix}"))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content[: -len(content) // 4])
    again = auto(**settings).apply(sim, data(), score=qlab.SQNR(data()))
    assert verdicts(again) == verdicts(first)
    assert torch.equal(again.sim.output(data()[0]), first.sim.output(data()[0]))


def test_other_data_or_settings_do_not_take_each_others_stages(sim, tmp_path):
    auto(resume_dir=str(tmp_path)).apply(sim, data(), score=Counting(data()))
    Counting.calls = 0
    other = auto(resume_dir=str(tmp_path)).apply(sim, data(2), score=Counting(data()))
    assert Counting.calls >= len(other.stages) - 3


# Leaving with it ----------------------------------------------------------------------------------------------------


def test_the_result_is_saved_whole_with_one_report(sim, tmp_path):
    target = tmp_path / "new" / "folder"
    result = auto(save_dir=str(target)).apply(sim, data(), score=qlab.SQNR(data()))
    loaded = qlab.load(target / "sim.safetensors", network(), data()[0])
    assert torch.equal(loaded.output(data()[0]), result.sim.output(data()[0]))
    assert {"model.onnx", "model.encodings"} <= {file.name for file in target.iterdir()}
    page = (target / "report.html").read_text()
    assert "CrossLayerEqualization" in page
    assert "ONNX Runtime" in page
    assert not result.notes
    run = onnxruntime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
    (there,) = run.run(None, {run.get_inputs()[0].name: data()[0].numpy()})
    step = float(result.sim["8"].output.encoding.scale)
    assert abs(torch.from_numpy(there) - result.sim.output(data()[0])).max() < 3 * step
    assert not [file for file in target.iterdir() if file.name.startswith(".")]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        result.save(tmp_path / "file")


def test_the_result_shows_itself_and_can_be_adopted(sim):
    result = auto().apply(sim, data(), score=qlab.SQNR(data()))
    assert "CrossLayerEqualization" in repr(result)
    shown = result._repr_html_()
    assert "<table" in shown
    assert "<img" in shown
    twin = copy.deepcopy(sim)
    result.adopt(twin)
    assert torch.equal(twin.output(data()[0]), result.sim.output(data()[0]))
    lab = qlab.Lab(copy.deepcopy(sim), data())
    lab.run(result.adopt)
    assert torch.equal(lab.sim.output(data()[0]), result.sim.output(data()[0]))
    lab.undo()
    assert torch.equal(lab.sim.output(data()[0]), sim.output(data()[0]))


# Reach --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
def test_the_rescaled_mobilenet_at_8_bits_per_tensor_comes_within_half_a_point_of_float(fold):
    digits = qlab.examples.digits()
    model = qlab.examples.rescale(qlab.examples.mobilenet(), (0.03, 30.0), fold=fold)
    score = qlab.Accuracy(digits.test)
    result = auto(allowed_drop=0.005).apply(model, digits.calibration(4), score=score, preset=qlab.presets.w8a8())
    assert result.is_target_met
    assert float(result.sim.evaluate(score)) >= result.float_score - 0.005
    assert result.stages.set_index("stage").score["as given"] < 0.9


@pytest.mark.slow
def test_the_rescaled_mobilenet_at_4_bits_per_tensor_is_no_worse_than_each_technique_alone():
    digits = qlab.examples.digits()
    calibration, score = digits.calibration(4), qlab.Accuracy(digits.test)
    model = qlab.examples.rescale(qlab.examples.mobilenet(), (0.03, 30.0))
    sim = qlab.QuantSim(model, calibration[0], qlab.presets.w4a8())
    sim.calibrate(calibration)
    noise = qlab.SQNR(digits.test)
    result = qlab.AutoQuant(stop_at_target=False, within_error=True).apply(sim, calibration, score=score)
    singles = (
        qlab.BatchNormFolding(), qlab.CrossLayerEqualization(), qlab.BiasCorrection(), qlab.AdaRound(), qlab.GPTQ(),
        qlab.SequentialMSE(),
    )  # fmt: skip
    assert any("AdaRound" in stage for stage in result.stages.stage)
    reached, accuracy = float(result.sim.evaluate(noise)), result.sim.evaluate(score)
    assert reached == pytest.approx(result.best.sqnr)
    for technique in singles:
        alone = copy.deepcopy(sim)
        technique.apply(alone, calibration)
        assert reached >= float(alone.evaluate(noise)), technique
        other = alone.evaluate(score)
        assert float(accuracy) >= float(other) - accuracy.standard_error, technique
