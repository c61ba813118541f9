"""A disk that takes no more, and files of another version, cost the resumption and not the work."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import qlab
from qlab.sim.streaming import stream
from tests.faults.faults import full_disk
from tests.techniques.test_transactions import OWN, differing, labelled, original, score, state, technique

__all__ = ["original"]

CACHED = [name for name, made in OWN.items() if "cache_dir" in made.__dataclass_fields__]
INPUTS = [x for x, _ in labelled()]


def with_cache(name: str, folder: Path) -> Any:
    return OWN[name](**{**vars(technique(name)), "cache_dir": str(folder)})


@pytest.mark.parametrize("name", CACHED)
def test_rounding_goes_on_where_its_cache_cannot_be_written_and_says_so(original, name, tmp_path):
    plain, sim = copy.deepcopy(original), copy.deepcopy(original)
    technique(name).apply(plain, INPUTS)
    with full_disk():
        report = with_cache(name, tmp_path).apply(sim, INPUTS)
    assert differing(state(sim), state(plain)) == []
    assert any("could not be kept" in note and str(tmp_path) in note for note in report.notes)
    assert list(tmp_path.iterdir()) == []  # no half-written file
    again = copy.deepcopy(original)
    assert "could not be kept" not in " ".join(with_cache(name, tmp_path).apply(again, INPUTS).notes)
    assert differing(state(again), state(plain)) == []


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_of_another_version_is_not_used(original, name, tmp_path, monkeypatch):
    plain, sim = copy.deepcopy(original), copy.deepcopy(original)
    technique(name).apply(plain, INPUTS)
    with monkeypatch.context() as older:
        older.setattr("qlab.techniques.rounding_cache.FORMAT", "qlab-rounding-0")
        with_cache(name, tmp_path).apply(copy.deepcopy(original), INPUTS)
    files = len(list(tmp_path.iterdir()))
    report = with_cache(name, tmp_path).apply(sim, INPUTS)
    assert differing(state(sim), state(plain)) == []
    assert not any("taken from" in note for note in report.notes)
    assert len(list(tmp_path.iterdir())) == 2 * files  # kept beside, under names of their own


def auto(folder: Path) -> qlab.AutoQuant:
    return qlab.AutoQuant(techniques=("CrossLayerEqualization",), stop_at_target=False, resume_dir=str(folder))


def stages(result: Any) -> list[tuple[str, str, float]]:
    return [(record.stage, record.verdict, record.score) for record in result.records]


def test_auto_quant_goes_on_where_stages_cannot_be_kept_and_ignores_those_of_another_version(
    original, tmp_path, monkeypatch
):
    plain = auto(tmp_path / "plain").apply(original, INPUTS, score=score())
    with full_disk():
        result = auto(tmp_path / "full").apply(original, INPUTS, score=score())
    assert stages(result) == stages(plain)
    assert any("could not be kept" in note for note in result.notes)
    assert list((tmp_path / "full").iterdir()) == []
    with monkeypatch.context() as older:
        older.setattr("qlab.techniques.stage_store._FORMAT", "qlab-stages-0")
        auto(tmp_path / "old").apply(original, INPUTS, score=score())
    result = auto(tmp_path / "old").apply(original, INPUTS, score=score())
    assert stages(result) == stages(plain)


def test_a_sim_that_cannot_be_written_leaves_the_file_that_was_there(original, tmp_path):
    path = tmp_path / "sim.safetensors"
    original.save(path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=r"sim\.safetensors"):
        original.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_activations_that_fit_neither_memory_nor_disk_are_an_error_that_says_what_to_do(original):
    sim, before = copy.deepcopy(original), state(original)
    rounding = qlab.GPTQ(memory=1)
    wide = [torch.randn(64, 3, 8, 8) for _ in range(20)]
    with full_disk(), pytest.raises(OSError, match="memory"):
        rounding.apply(sim, wide)
    assert differing(state(sim), before) == []
    with full_disk(1 << 20):
        assert len(list(stream(sim, wide, ["6"], max_bytes=0))) == 1


def test_training_goes_on_where_checkpoints_cannot_be_kept_and_says_so(original, tmp_path):
    plain, sim = copy.deepcopy(original), copy.deepcopy(original)
    qlab.QAT(epochs=2).apply(plain, labelled())
    with full_disk():
        report = qlab.QAT(epochs=2, checkpoint_dir=str(tmp_path)).apply(sim, labelled())
    assert differing(state(sim), state(plain)) == []
    assert sum("could not be kept" in note for note in report.notes) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_version_is_not_resumed(original, tmp_path, monkeypatch):
    plain, sim = copy.deepcopy(original), copy.deepcopy(original)
    qlab.QAT(epochs=2).apply(plain, labelled())
    with monkeypatch.context() as older:
        older.setattr("qlab.techniques.qat_checkpoint.FORMAT", "qlab-qat-0")
        qlab.QAT(epochs=2, checkpoint_dir=str(tmp_path)).apply(copy.deepcopy(original), labelled())
    report = qlab.QAT(epochs=2, checkpoint_dir=str(tmp_path)).apply(sim, labelled())
    assert any("started anew" in note for note in report.notes)
    assert report.values["steps"] == 2 * len(labelled())
    assert differing(state(sim), state(plain)) == []
