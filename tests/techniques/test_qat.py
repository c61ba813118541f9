"""QAT as a technique: it gains where bits are few, keeps the best, resumes, stops on nonsense, restores on cancel."""

import copy
import itertools
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import Cancelled, InputError, NotCalibrated, SpecError, UnknownLayer
from qlab.progress import Cancellable
from qlab.settings import SettingError
from qlab.techniques.qat import QAT
from qlab.techniques.training_control import DivergedLoss, TrainingControl, TrainingStep


def make(preset=None) -> tuple[qlab.QuantSim, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(96, 6)
    labels = model(x).argmax(1)
    labelled = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, 96, 16)]
    sim = qlab.QuantSim(model, x, preset or qlab.presets.w4a4())
    sim.configure("*", weight={"bits": 2}, output={"bits": 3})
    sim.calibrate(labelled)
    return sim, labelled


@pytest.mark.parametrize("mode", ["regular", "range_learning"])
def test_training_gains_and_the_best_epoch_is_kept(mode):
    sim, labelled = make()
    score = qlab.Accuracy(labelled)
    before = sim.evaluate(score)
    report = QAT(mode=mode, epochs=12, learning_rate=2e-2).apply(sim, labelled, score=score)
    assert sim.evaluate(score) > before + 0.1
    assert report.values["after"] == max(row["accuracy"] for row in report.values["epochs"])
    assert {row["layer"] for row in report.rows} == {"0", "2"}
    assert float(sim.evaluate(score)) == pytest.approx(report.values["after"])
    assert list(sim.range_parameters()) == []
    assert not sim.training


def test_an_epoch_that_is_worse_is_not_kept():
    sim, labelled = make()
    want = sim.output(labelled[0])
    report = QAT(epochs=1, learning_rate=1.0, range_learning_rate=1.0).apply(sim, labelled, score=qlab.SQNR(labelled))
    assert report.values["epoch"] == 0
    assert torch.allclose(sim.output(labelled[0]), want, atol=1e-5)


def test_the_same_seed_gives_the_same_result():
    results = []
    for _ in range(2):
        sim, labelled = make()
        QAT(epochs=2).apply(sim, labelled)
        results.append(sim.output(labelled[0]))
    assert torch.equal(*results)


class Recorder:
    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[TrainingStep] = []
        self.calls, self.stop_after = 0, stop_after

    def step(self, done: int, total: int, text: str = "") -> None:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise Cancelled("enough")

    def publish(self, record: object) -> None:
        self.records.append(record)  # type: ignore[arg-type]


def test_steps_epochs_and_the_followed_range_are_published():
    sim, labelled = make()
    recorder = Recorder()
    QAT(epochs=3, follow="1").apply(sim, labelled, score=qlab.SQNR(labelled), progress=recorder)
    epochs = [record for record in recorder.records if record.score is not None]
    assert [record.epoch for record in epochs] == [0, 1, 2]
    steps = [record for record in recorder.records if record.layer == "1"]
    assert steps
    assert all(record.high > record.low for record in steps)


@pytest.mark.parametrize("keep", ["restore", "best"])
def test_cancel_restores_or_keeps_the_best_so_far(keep):
    sim, labelled = make()
    before = sim.output(labelled[0])
    training = QAT(epochs=5, learning_rate=1e-2, on_cancel=keep)
    recorder = Recorder(stop_after=2 * len(labelled) + 2)
    if keep == "restore":
        with pytest.raises(Cancelled):
            training.apply(sim, labelled, score=qlab.SQNR(labelled), progress=recorder)
        assert torch.equal(sim.output(labelled[0]), before)
        assert sim.qat_mode is None
    else:
        report = training.apply(sim, labelled, score=qlab.Accuracy(labelled), progress=recorder)
        scores = [row["accuracy"] for row in report.values["epochs"]]
        assert len(scores) == 2
        assert any("cancelled in epoch 3" in note for note in report.notes)
        assert float(sim.evaluate(qlab.Accuracy(labelled))) == max(scores) > report.values["before"]


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    whole, labelled = make()
    score = qlab.SQNR(labelled)
    settings = {"epochs": 4, "learning_rate": 1e-2}
    QAT(**settings).apply(whole, labelled, score=score)
    sim, _ = make()
    resumable = QAT(**settings, checkpoint_dir=str(tmp_path))
    with pytest.raises(Cancelled):
        resumable.apply(sim, labelled, score=score, progress=Recorder(stop_after=2 * len(labelled) + 1))
    recorder = Recorder()
    report = resumable.apply(sim, labelled, score=score, progress=recorder)
    assert recorder.calls == 2 * len(labelled)
    assert len(report.values["epochs"]) == 4
    assert torch.equal(sim.output(labelled[0]), whole.output(labelled[0]))
    assert all(torch.equal(a, b) for a, b in zip(sim.parameters(), whole.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["qat.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "other settings"])
def test_a_checkpoint_that_does_not_fit_is_left_aside(tmp_path, damage):
    sim, labelled = make()
    QAT(epochs=1, checkpoint_dir=str(tmp_path)).apply(sim, labelled)
    path = tmp_path / "qat.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    other, _ = make()
    report = QAT(epochs=1, learning_rate=2e-3, checkpoint_dir=str(tmp_path)).apply(other, labelled)
    assert any("started anew" in note for note in report.notes)


def test_a_loss_that_is_no_number_stops_and_restores():
    sim, labelled = make()
    before = sim.output(labelled[0])
    with pytest.raises(DivergedLoss, match="lower learning rate"):
        QAT(loss=lambda result, labels: result.sum() * float("nan")).apply(sim, labelled)
    assert torch.equal(sim.output(labelled[0]), before)


def test_missing_labels_calibration_or_data_are_said():
    sim, labelled = make()
    with pytest.raises(InputError, match="labelled batches"):
        QAT(distill=False).apply(sim, [x for x, _ in labelled])
    with pytest.raises(InputError, match="at least one batch"):
        QAT().apply(sim, [])
    uncalibrated = qlab.QuantSim(nn.Linear(6, 3), labelled[0])
    with pytest.raises(NotCalibrated):
        QAT().apply(uncalibrated, labelled)


def test_without_labels_distillation_trains():
    sim, labelled = make()
    score = qlab.SQNR(labelled)
    before = sim.evaluate(score)
    QAT(epochs=8, learning_rate=1e-2).apply(sim, [x for x, _ in labelled], score=score)
    assert sim.evaluate(score) > before + 1


def test_a_layer_can_be_given_other_bits_by_a_function_between_epochs():
    sim, labelled = make()

    def change(sim: qlab.QuantSim, epoch: int) -> None:
        if epoch == 1:
            sim["2"].weight.bits = 4

    QAT(epochs=2, between_epochs=change).apply(sim, labelled)
    assert sim["2"].weight.bits == 4


@pytest.mark.parametrize("mode", ["regular", "range_learning"])
def test_bits_changed_before_an_epoch_divide_the_range_anew_and_its_ends_train_on(mode):
    sim, labelled = make()
    ends: list[float] = []

    def look(sim: qlab.QuantSim, epoch: int) -> None:
        ends.append(float(sim["1"].output.encoding.maximum))

    edits = [(2, "2", "weight.bits", 4), (2, "1", "output.bits", 6)]
    report = QAT(mode=mode, epochs=4, learning_rate=1e-2, edits=edits, between_epochs=look).apply(sim, labelled)
    assert (sim["2"].weight.bits, sim["1"].output.bits) == (4, 6)
    weight, output = sim["2"].weight.encoding, sim["1"].output.encoding
    assert (weight.qmax - weight.qmin, output.qmax - output.qmin) == (15, 63)
    assert len(sim["2"].weight.quantized().unique()) > 4  # more than 2 bits can tell
    assert report.notes[-2:] == ("before epoch 2: 2: weight bits 4", "before epoch 2: 1: output bits 6")
    if mode == "range_learning":
        assert ends[1] != ends[0]
        assert ends[2] == pytest.approx(ends[1], rel=0.5)  # the range that was learned, not a new one
        assert len({*ends, float(output.maximum)}) == 5  # it moves in every epoch


def test_a_frozen_layer_stays_and_trains_again_afterwards():
    sim, labelled = make()
    seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def look(sim: qlab.QuantSim, epoch: int) -> None:
        first, last = sim.model[0], sim.model[2]
        seen.append(
            (first.weight.detach().clone(), last.weight.detach().clone(), float(sim["0"].weight.encoding.scale))
        )

    edits = [(2, "0", "frozen", True), (4, "0", "frozen", False)]
    QAT(epochs=5, learning_rate=1e-2, edits=edits, between_epochs=look).apply(sim, labelled)
    moved = [not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(seen)]
    assert moved == [True, False, False, True]
    assert all(not torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen))
    assert seen[1][2] == seen[2][2] == seen[3][2] != seen[4][2]
    assert all(parameter.requires_grad for parameter in sim.model.parameters())


class Steered(Recorder):
    """Somebody who changes layers in the second epoch, and may stop in the fourth."""

    def publish(self, record: object) -> None:
        super().publish(record)
        assert isinstance(record, TrainingStep)
        if record.epoch == 1 and record.score is None:
            threading.Thread(target=record.control.set_bits, args=("2", "weight", 5)).start()
            record.control.freeze("0")


def test_what_a_person_changed_is_kept_as_settings_that_train_the_same_again():
    sim, labelled = make()
    score = qlab.SQNR(labelled)
    report = QAT(epochs=4, learning_rate=1e-2).apply(sim, labelled, score=score, progress=Steered())
    assert set(report.as_done.edits) == {(3, "2", "weight.bits", 5), (3, "0", "frozen", True)}
    again, _ = make()
    report.as_done.apply(again, labelled, score=score)
    assert again["2"].weight.bits == 5
    assert torch.equal(again.output(labelled[0]), sim.output(labelled[0]))
    assert QAT(epochs=1).apply(make()[0], labelled).as_done is None


def test_a_training_ended_by_hand_is_kept_as_settings_that_end_it_there():
    sim, labelled = make()
    score, recorder = qlab.SQNR(labelled), Recorder(stop_after=2 * len(labelled) + 2)
    report = QAT(epochs=5, on_cancel="best").apply(sim, labelled, score=score, progress=recorder)
    assert report.as_done.stop_after == 2
    again, _ = make()
    report.as_done.apply(again, labelled, score=score)
    assert torch.equal(again.output(labelled[0]), sim.output(labelled[0]))


def test_a_steered_training_in_a_lab_is_a_step_that_the_script_can_write():
    model = make()[0].model
    labelled = [(x.clone(), y) for x, y in make()[1]]
    lab = qlab.Lab(qlab.QuantSim(model, labelled[0][0], qlab.presets.w4a4()), labelled)
    control = TrainingControl()
    control.set_bits("2", "weight", 3)
    lab.run(QAT(epochs=2, control=control))
    assert "edits=((1, '2', 'weight.bits', 3),)" in lab.script()
    names = {"qlab": qlab, "model": make()[0].model, "example": labelled[0][0], "batches": labelled}
    exec(lab.script(), names)  # the lab's own text
    assert torch.equal(names["sim"].output(labelled[0]), lab.sim.output(labelled[0]))


def test_an_interrupted_run_resumes_with_the_changes_made_by_hand(tmp_path):
    sim, labelled = make()
    score, training = qlab.SQNR(labelled), QAT(epochs=5, learning_rate=1e-2, checkpoint_dir=str(tmp_path))
    whole = training.apply(copy.deepcopy(sim), labelled, score=score, progress=Steered())
    (tmp_path / "qat.safetensors").unlink()
    with pytest.raises(Cancelled):
        training.apply(sim, labelled, score=score, progress=Steered(stop_after=3 * len(labelled) + 2))
    resumed = training.apply(sim, labelled, score=score)
    assert [row["epoch"] for row in resumed.values["epochs"]] == [1, 2, 3, 4, 5]
    assert sim["2"].weight.bits == 5
    assert resumed.values["after"] == pytest.approx(whole.values["after"], abs=1e-4)


def test_the_share_that_a_followed_range_clips_is_that_of_the_batch():
    sim, labelled = make(qlab.presets.w8a8())
    sim["1"].output.set_range(0.0, 0.8)
    for layer, part in (("1", "output"), ("0", "weight")):
        recorder, twin = Recorder(), copy.deepcopy(sim)
        twin["1"].output.enabled = part == "output"
        QAT(epochs=1, learning_rate=0.0, range_learning_rate=0.0, follow=layer).apply(twin, labelled, progress=recorder)
        step = recorder.records[0]
        if part == "output":
            inputs = sim.input_quantizer(sim.graph["0"])(first_batch(labelled)[0])
            values = torch.relu(nn.functional.linear(inputs, sim["0"].weight.quantized(), sim.model[0].bias))
        else:
            values = sim["0"].weight.weight
        scale = (step.high - step.low) / (2 ** getattr(sim[layer], part).bits - 1)
        outside = (values < step.low - scale / 2) | (values > step.high + scale / 2)
        assert (step.layer, step.part) == (layer, part)
        assert step.clipped == pytest.approx(float(outside.float().mean()), abs=0.004)
        assert (step.clipped > 0.02) == (part == "output")


def first_batch(labelled: list) -> tuple:
    """The batch that seed 0 brings first."""
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
    return labelled[int(order[0])]


def test_edits_that_cannot_be_are_said():
    sim, labelled = make()
    for wrong in ((0, "2", "weight.bits", 4), (1, "2", "bits", 4), (1, "2"), "2"):
        with pytest.raises(SettingError, match="an edit is"):
            QAT(edits=[wrong])
    with pytest.raises(SpecError, match="bits"):
        TrainingControl().set_bits("2", "weight", 1)
    before = sim.output(labelled[0])
    with pytest.raises(UnknownLayer):
        QAT(edits=[(1, "fc", "frozen", True)]).apply(sim, labelled)
    with pytest.raises(SettingError, match="no weight of its own"):
        QAT(edits=[(1, "1", "weight.bits", 4)]).apply(sim, labelled)
    assert torch.equal(sim.output(labelled[0]), before)


@pytest.mark.slow
def test_three_bits_come_back_on_the_digits_mobilenet():
    digits = qlab.examples.digits()
    sim = qlab.QuantSim(qlab.examples.mobilenet(), digits.test[0], qlab.presets.w4a4())
    qlab.BatchNormFolding().apply(sim)
    sim.configure("*", weight={"bits": 3, "rule": "sqnr"}, output={"bits": 3})
    sim.calibrate(digits.calibration())
    accuracy = qlab.Accuracy(digits.test)
    before, wanted = sim.evaluate(accuracy), sim.evaluate(accuracy, quantized=False)
    QAT(epochs=3).apply(sim, digits.train)
    after = sim.evaluate(accuracy)
    assert after.interval[0] > before.interval[1]  # better by more than both intervals
    assert after > wanted - 0.015


@pytest.mark.slow
def test_two_processes_train_the_same_parameters(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import torch, torch.distributed as dist
            from torch import nn
            from torch.nn.parallel import DistributedDataParallel
            import qlab

            dist.init_process_group("gloo")
            rank = dist.get_rank()
            torch.set_num_threads(1)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
            x = torch.randn(64, 6)
            y = model(x).argmax(1)
            sim = qlab.QuantSim(model, x, qlab.presets.w4a4())
            sim.calibrate([x])
            sim.qat("range_learning")
            start = torch.cat([p.detach().reshape(-1) for p in sim.parameters()]).clone()
            parallel = DistributedDataParallel(sim)
            optimizer = torch.optim.Adam(sim.parameters(), lr=1e-2)
            losses = []
            for step in range(12):
                part = slice(32 * rank, 32 * rank + 32)
                loss = nn.functional.cross_entropy(parallel(x[part]), y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            mine = torch.cat([p.detach().reshape(-1) for p in sim.parameters()])
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(*both)
            assert not torch.equal(mine, start)
            assert losses[-1] < losses[0]
            dist.destroy_process_group()
            print("rank", rank, "done", flush=True)
            os._exit(0)  # gloo's threads abort one in five interpreters that exit by themselves, without qlab as well
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2


def test_a_progress_of_another_thread_cancels():
    sim, labelled = make()
    progress = Cancellable()
    progress.cancel()
    with pytest.raises(Cancelled):
        QAT().apply(sim, labelled, progress=progress)
