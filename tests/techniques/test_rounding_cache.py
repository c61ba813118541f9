"""Finished layers on disk: an interrupted run goes on, and nothing wrong or damaged is ever used."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qlab
from qlab.errors import Cancelled
from qlab.techniques.rounding_cache import RoundingCache
from tests.techniques.rounding import codes, correlated, equal, two_layers, weights

TECHNIQUES = {
    "AdaRound": qlab.AdaRound(),
    "AdaRound sgd": qlab.AdaRound(method="sgd", iterations=40),
    "GPTQ": qlab.GPTQ(),
    "SequentialMSE": qlab.SequentialMSE(),
}


def cached(name: str, folder: Path, **settings: object) -> qlab.techniques.Technique:
    import dataclasses

    return dataclasses.replace(TECHNIQUES[name], cache_dir=str(folder), **settings)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda file: (file.stat().st_mtime_ns, file.name))


class StopsAt:
    """A progress that cancels when a text is reported, and keeps what was."""

    def __init__(self, text: str = "") -> None:
        self.text, self.seen = text, []

    def step(self, done: int, total: int, text: str = "") -> None:
        self.seen.append(text)
        if self.text and text.startswith(self.text):
            raise Cancelled(text)


def results(sim: qlab.QuantSim) -> dict[str, torch.Tensor | None]:
    found = dict(codes(sim))
    for name, weight in weights(sim).items():
        found |= {f"{name}.scale": weight.required_encoding().scale, f"{name}.bias": weight.bias_correction}
    return found


def same(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> bool:
    return all((x is None and b[n] is None) or (x is not None and torch.equal(x, b[n])) for n, x in a.items())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_an_interrupted_run_goes_on_where_it_was_and_ends_as_an_unbroken_one(name, tmp_path):
    original, batches = two_layers()
    whole = copy.deepcopy(original)
    unbroken = TECHNIQUES[name].apply(whole, batches)
    sim = copy.deepcopy(original)
    with pytest.raises(Cancelled):
        cached(name, tmp_path).apply(sim, batches, progress=StopsAt("2: rounding"))
    assert codes(sim) == {"0": None, "2": None}  # the sim is as it was, the finished layer is kept
    assert len(files(tmp_path)) == 1
    progress = StopsAt()
    report = cached(name, tmp_path).apply(sim, batches, progress=progress)
    assert any(note.startswith("1 layers were taken from") for note in report.notes)
    assert not any(text.startswith("0: rounding") for text in progress.seen)
    assert same(results(sim), results(whole))
    assert report.rows == unbroken.rows
    assert torch.equal(sim.output(batches[0]), whole.output(batches[0]))
    assert [weight.frozen for weight in weights(sim).values()] == [weight.frozen for weight in weights(whole).values()]
    again = copy.deepcopy(original)
    report = cached(name, tmp_path).apply(again, batches)
    assert any(note.startswith("2 layers were taken from") for note in report.notes)
    assert same(results(again), results(whole))
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def damage_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of a tensor
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("no tensors at all")


def foreign(file: Path) -> None:
    save_file({"codes": torch.zeros(3)}, file)  # a file of another program


def header(file: Path) -> None:
    """One digit of the grid's limits is another one; every tensor is as it was."""
    content = file.read_bytes()
    assert content.count(rb"\"encoding\": [-8, 7") == 1
    file.write_bytes(content.replace(rb"\"encoding\": [-8, 7", rb"\"encoding\": [-9, 7"))


def no_header(file: Path) -> None:
    """Valid tensors under a header that is something else."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={"qlab": "[1, 2]"})


@pytest.mark.parametrize("spoil", [damage_bytes, cut, empty, text, foreign, header, no_header])
def test_a_damaged_file_is_noticed_and_its_layer_rounded_anew(spoil, tmp_path):
    original, batches = two_layers()
    whole = copy.deepcopy(original)
    cached("AdaRound", tmp_path).apply(whole, batches)
    first = files(tmp_path)[0]
    good = first.read_bytes()
    spoil(first)
    sim = copy.deepcopy(original)
    report = cached("AdaRound", tmp_path).apply(sim, batches)
    assert any("1 files" in note and "damaged" in note for note in report.notes)
    assert same(results(sim), results(whole))
    assert files(tmp_path)[-1] == first  # written again
    assert first.read_bytes() == good


def test_a_whole_file_under_another_s_name_is_not_used(tmp_path):
    original, batches = two_layers()
    whole = copy.deepcopy(original)
    cached("AdaRound", tmp_path).apply(whole, batches)
    first, second = files(tmp_path)
    first.write_bytes(second.read_bytes())
    sim = copy.deepcopy(original)
    report = cached("AdaRound", tmp_path).apply(sim, batches)
    assert any("1 files" in note and "damaged" in note for note in report.notes)
    assert same(results(sim), results(whole))


def test_every_thing_that_the_result_depends_on_is_in_its_key(tmp_path):
    original, batches = two_layers()
    cached("AdaRound", tmp_path).apply(copy.deepcopy(original), batches)

    def taken(change=lambda sim: None, data=None, **settings) -> int:
        sim = copy.deepcopy(original)
        change(sim)
        notes = cached("AdaRound", tmp_path, **settings).apply(sim, batches if data is None else data).notes
        return sum(int(note.split()[0]) for note in notes if "taken from" in note)

    def scaled(sim: qlab.QuantSim) -> None:
        with torch.no_grad():
            sim.model[2].weight.mul_(1.5)

    def moved(sim: qlab.QuantSim) -> None:
        with torch.no_grad():
            sim.model[0].bias.add_(0.1)

    assert taken() == 2
    assert taken(seed=3) == 0
    assert taken(damping=0.02) == 0
    assert taken(data=[correlated(64, 12, seed=9)]) == 0
    assert taken(data=batches[::-1]) == 0
    assert taken(lambda sim: sim.configure("*", weight={"bits": 3})) == 0
    assert taken(lambda sim: sim.configure("2", weight={"bits": 3})) == 1  # the layer before does not depend on it
    assert taken(scaled) == 1
    assert taken(moved) == 0  # all that follows sees other inputs
    assert taken(lambda sim: sim.configure("input", output={"bits": 6})) == 0
    assert taken(layers="2") == 0  # its inputs are those of a first layer that was not rounded
    assert taken(layers="0") == 1


def test_a_folder_is_made_and_keys_are_of_contents_not_of_places(tmp_path):
    folder = tmp_path / "a" / "b"
    original, batches = two_layers()
    cached("GPTQ", folder).apply(copy.deepcopy(original), batches)
    twin, twin_batches = two_layers()  # captured anew: other objects, the same contents
    keys = [RoundingCache.keys("settings", sim, ["0", "2"], data) for sim, data in ((original, batches),) * 2]
    assert keys[0] == keys[1] == RoundingCache.keys("settings", twin, ["0", "2"], twin_batches)
    report = cached("GPTQ", folder).apply(twin, twin_batches)
    assert any("2 layers were taken" in note for note in report.notes)
    assert RoundingCache.at(None) is None


def test_layers_from_the_cache_count_as_rounded_and_end_like_others(tmp_path):
    original, batches = two_layers()
    cached("AdaRound", tmp_path).apply(copy.deepcopy(original), batches)
    sim = copy.deepcopy(original)
    cached("AdaRound", tmp_path).apply(sim, batches)
    sim.calibrate(batches)
    kept = codes(sim)
    assert all(value is not None for value in kept.values())
    sim.configure("0", weight={"bits": 6})
    assert sim["0"].weight.rounding is None
    assert equal({"2": codes(sim)["2"]}, {"2": kept["2"]})
    qlab.AdaRound().apply(sim, batches)
    assert sim["0"].weight.rounding is not None
