"""A saved sim is safetensors and JSON: read without pickle, and a damaged or forged file is refused with a sentence."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qlab
from qlab.errors import InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(8, 4)
    sim = qlab.QuantSim(model, x)
    sim.calibrate([x])
    path = tmp_path_factory.mktemp("saved") / "sim.safetensors"
    sim.save(path)
    return path, model, x, sim.output(x)


def content(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["qlab"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_neither_saving_nor_loading_uses_pickle(saved, tmp_path, monkeypatch):
    path, model, x, output = saved

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    sim = qlab.load(path, model, x)
    sim.save(tmp_path / "again.safetensors")
    monkeypatch.undo()
    assert torch.equal(sim.output(x), output)
    assert content(path)[0] == content(tmp_path / "again.safetensors")[0]


FORGED = {
    "deeply nested": lambda header, tensors: ("[" * 100_000, tensors),
    "no header": lambda header, tensors: ("null", tensors),
    "another format": lambda header, tensors: (json.dumps(header | {"format": "x"}), tensors),
    "a preset of another kind": lambda header, tensors: (json.dumps(header | {"preset": [1]}), tensors),
    "an unknown setting": lambda header, tensors: (json.dumps(header | {"preset": {"exec": "x"}}), tensors),
    "no layers": lambda header, tensors: (json.dumps({k: v for k, v in header.items() if k != "layers"}), tensors),
    "an unknown edit": lambda header, tensors: (json.dumps(header | {"edits": [["1", "os.system"]]}), tensors),
    "a quantizer of another kind": lambda h, t: (json.dumps(h | {"quantizers": dict.fromkeys(h["quantizers"], 3)}), t),
    "no grids": lambda header, tensors: (json.dumps(header), {k: v for k, v in tensors.items() if "scale" not in k}),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused_with_a_sentence(saved, tmp_path, case):
    path, model, x, _ = saved
    header, tensors = FORGED[case](*content(path))
    save_file(tensors, tmp_path / "forged.safetensors", metadata={"qlab": header})
    with pytest.raises(InputError, match=r"forged\.safetensors (is not|does not hold)"):
        qlab.load(tmp_path / "forged.safetensors", model, x)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04K\x01." + b])
def test_a_damaged_file_is_refused_with_a_sentence(saved, tmp_path, damage):
    path, model, x, _ = saved
    (tmp_path / "bad.safetensors").write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="is not a readable sim file"):
        qlab.load(tmp_path / "bad.safetensors", model, x)
