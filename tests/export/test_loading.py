"""Encodings into a sim: recorded files give the recorded results, what is written comes back, bad files do nothing."""

import copy
import functools
import json
import random

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError, UnknownLayer
from tests.reference import GRANULARITIES, RECORDED, recorded

FORMS = ["0.6.1", "1.0.0", "2.0.0", "torch"]
NAMES = {"0.6.1": {"t.1": "x", "29": "fc"}}  # sorted by name, such a file does not tell which is which


def recorded_file(granularity, form):
    return RECORDED / "encodings" / f"{granularity}-{form}.encodings"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_recorded_file_gives_the_recorded_simulated_output(reference_sim, granularity, form):
    sim = reference_sim(granularity)
    loaded = sim.load_encodings(recorded_file(granularity, form), names=NAMES.get(form))
    assert loaded.version == ("0.6.1" if form == "torch" else form)
    assert not loaded.unmatched
    assert not loaded.untouched
    step = sim["fc"].output.encoding.scale.item()
    wanted = recorded()[f"sim_output_{granularity}"]
    torch.testing.assert_close(sim.output(recorded()["input"]), wanted, rtol=0, atol=step * 1e-3)


def test_names_that_a_sorted_file_made_up_are_listed_and_not_guessed(reference_sim):
    sim = reference_sim("per_tensor")
    loaded = sim.load_encodings(recorded_file("per_tensor", "0.6.1"), strict=False)
    assert set(loaded.unmatched) == {"t.1", "29"}
    assert set(loaded.untouched) == {"x", "fc"}
    with pytest.raises(InputError, match=r"'t\.1'"):
        sim.load_encodings(recorded_file("per_tensor", "0.6.1"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_writing_a_loaded_file_says_the_same_of_every_tensor(reference_sim, tmp_path, granularity):
    sim = reference_sim(granularity)
    loaded = sim.load_encodings(recorded_file(granularity, "1.0.0"))
    sim.export(tmp_path / "again", formats=["encodings"])
    theirs = json.loads(recorded_file(granularity, "1.0.0").read_text())
    ours = json.loads((tmp_path / "again.encodings").read_text())
    for section in ("activation_encodings", "param_encodings"):
        written = {entry["name"]: entry for entry in ours[section]}
        assert theirs[section]
        for entry in theirs[section]:
            layer = loaded.loaded[entry["name"]].replace(" (weight)", ".weight")
            assert written[layer] == entry | {"name": layer}
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in theirs.items()}


class Varied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Conv2d(2, 6, 3, bias=False), nn.ReLU()
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.norm, self.head = nn.LayerNorm(14), nn.Linear(14, 5)
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        return self.head(torch.cat([self.norm(self.up(self.relu(self.first(x))) + self.shift)] * 2, dim=2).sigmoid())


VARIATIONS = {
    "as it is": {},
    "other bits": {"weight": {"bits": 4}, "output": {"bits": 16}},
    "odd bits": {"weight": {"bits": 6}, "output": {"bits": 5}},
    "strict": {"weight": {"scheme": "strict_symmetric"}, "output": {"scheme": "strict_symmetric"}},
    "unsigned": {"output": {"scheme": "unsigned_symmetric"}},
    "asymmetric by channel": {"weight": {"scheme": "asymmetric", "granularity": "per_channel"}},
    "blocks": {"weight": {"granularity": "per_block(4)"}},
}


@functools.cache
def captured():
    torch.manual_seed(0)
    model, x = Varied(), torch.randn(4, 2, 15, 15)
    return qlab.QuantSim(model, x), x


@functools.cache
def calibrated(variation):
    sim, x = copy.deepcopy(captured())
    sim.configure("*", **VARIATIONS[variation])
    sim.calibrate([x])
    return sim, x


def varied(variation="as it is"):
    return copy.deepcopy(calibrated(variation))


def everything(sim):
    """All that loading may change, as plain values."""
    return {
        name: (q.spec, q.enabled, q.encoding.qmin, q.encoding.qmax, q.encoding.scale, q.encoding.zero_point)
        for name, q in sim.quantizers.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k][:4] == b[k][:4] and torch.equal(a[k][4], b[k][4]) and torch.equal(a[k][5], b[k][5]) for k in a
    )


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_writing_and_reading_changes_nothing(tmp_path, variation, version):
    sim, x = varied(variation)
    if variation == "blocks" and version == "0.6.1":
        with pytest.raises(InputError, match=r"blocks.*encodings='1\.0\.0'"):
            sim.export(tmp_path / "m", encodings=version, formats=["encodings"])
        assert not list(tmp_path.iterdir())
        return
    sim.export(tmp_path / "m", encodings=version, formats=["encodings"])
    before, output = everything(sim), sim.output(x)
    loaded = sim.load_encodings(tmp_path / "m.encodings")
    assert same(before, everything(sim))
    assert torch.equal(output, sim.output(x))
    assert (loaded.version, loaded.unmatched, loaded.untouched) == (version, {}, ())


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("variation", ["as it is", "other bits", "odd bits", "asymmetric by channel"])
def test_another_sim_takes_over_grids_and_switches_from_a_file(tmp_path, variation, version):
    sim, x = varied(variation)
    sim["up"].weight.enabled = False
    sim["head"].output.enabled = False
    sim.export(tmp_path / "m", encodings=version, formats=["encodings"])
    fresh, _ = copy.deepcopy(captured())
    loaded = fresh.load_encodings(tmp_path / "m.encodings", partial=False)
    assert set(loaded.untouched) == {"up (weight)", "head"}
    assert torch.equal(fresh.output(x), sim.output(x))


def test_grids_stay_when_frozen_and_follow_new_data_otherwise(tmp_path):
    sim, x = varied()
    sim.export(tmp_path / "m", formats=["encodings"])
    for freeze in (True, False):
        sim.load_encodings(tmp_path / "m.encodings", freeze=freeze)
        before = everything(sim)
        sim.calibrate([10 * x])
        assert same(before, everything(sim)) == freeze


def test_a_rounding_survives_its_own_grid_and_goes_with_another(tmp_path):
    sim, _ = varied()
    weight = sim["first"].weight
    codes = torch.full(weight.weight.shape, 3, dtype=torch.int32)
    weight.set_rounding(codes)
    sim.export(tmp_path / "m", formats=["encodings"])
    sim.load_encodings(tmp_path / "m.encodings")
    assert torch.equal(weight.rounding, codes)
    file = json.loads((tmp_path / "m.encodings").read_text())
    next(e for e in file["param_encodings"] if e["name"] == "first.weight")["scale"][0] *= 2
    (tmp_path / "m.encodings").write_text(json.dumps(file))
    sim.load_encodings(tmp_path / "m.encodings")
    assert weight.rounding is None


def small_file(*entries, version="1.0.0"):
    activations = [
        {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "offset": [-10], "scale": [0.5]} | entry
        for entry in entries
    ]
    return {"version": version, "activation_encodings": activations, "param_encodings": []}


def load_of(tmp_path, content, **settings):
    sim, _ = varied()
    before = everything(sim)
    path = tmp_path / "file.encodings"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        return sim, sim.load_encodings(path, **settings)
    except (InputError, UnknownLayer):
        assert same(before, everything(sim)), "a refused file changed the sim"
        raise


def test_an_unknown_name_is_refused_with_the_nearest_ones_and_nothing_is_applied(tmp_path):
    content = small_file({"name": "norm"}, {"name": "heat"})
    with pytest.raises(InputError, match=r"'heat'.*Did you mean 'head'"):
        load_of(tmp_path, content)
    sim, loaded = load_of(tmp_path, content, strict=False)
    assert loaded.loaded == {"norm": "norm"}
    assert "'head'" in loaded.unmatched["heat"]
    assert sim["norm"].output.encoding.scale == 0.5
    assert load_of(tmp_path, content, names={"heat": "head"})[1].unmatched == {}
    with pytest.raises(UnknownLayer, match="'heat'"):
        load_of(tmp_path, content, names={"heat": "tail"})


def test_an_inheriting_layer_may_only_repeat_the_grid_it_inherits(tmp_path):
    sim, _ = varied()
    layer = next(name for name, entry in sim.placed.items() if entry.role is qlab.sim.Role.INHERITS)
    source = sim[layer].output.name
    same_grid = small_file({"name": source}, {"name": layer})
    assert set(load_of(tmp_path, same_grid)[1].loaded.values()) == {source, layer}
    other = small_file({"name": source}, {"name": layer, "scale": [0.25]})
    with pytest.raises(InputError, match=f"{layer!r} lies on the grid of {source!r}"):
        load_of(tmp_path, other)
    alone, _ = load_of(tmp_path, small_file({"name": layer}))
    assert alone[source].output.encoding.scale == 0.5


def test_a_float_entry_switches_its_quantizer_off(tmp_path):
    sim, _ = load_of(tmp_path, small_file({"name": "norm", "dtype": "FLOAT", "bw": 16}))
    assert not sim["norm"].output.enabled


PER_CHANNEL = {"enc_type": "PER_CHANNEL", "scale": [0.1, 0.2, 0.3], "offset": [0, 0, 0]}
HOSTILE = {
    "truncated": (json.dumps(small_file({"name": "norm"}))[:-20], "not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[]", "must be an object"),
    "deeply nested": ("[" * 100_000, "nested too deeply"),
    "nested scales": (
        '{"version": "2.0.0", "encodings": [{"name": "norm", "output_dtype": "int8", "y_scale": '
        + "[" * 20 + "1.0" + "]" * 20 + "}]}",
        "nested too deeply",
    ),
    "a NaN scale": (json.dumps(small_file({"name": "norm", "scale": [float("nan")]})), "NaN"),
    "an infinite scale": (json.dumps(small_file({"name": "norm", "scale": ["x"]})).replace('"x"', "1e999"), "finite"),
    "a scale of 0": (small_file({"name": "norm", "scale": [0.0]}), "not above 0"),
    "a scale that vanishes in float32": (small_file({"name": "norm", "scale": [1e-60]}), "not above 0"),
    "a negative scale": (small_file({"name": "norm", "scale": [-1.0]}), "not above 0"),
    "a scale as text": (small_file({"name": "norm", "scale": ["1"]}), "must be numbers"),
    "a scale as truth": (small_file({"name": "norm", "scale": [True]}), "must be numbers"),
    "no scale": (small_file({"name": "norm", "scale": []}), "0 scales"),
    "an offset between integers": (small_file({"name": "norm", "offset": [-1.5]}), "whole numbers"),
    "an offset outside the grid": (small_file({"name": "norm", "offset": [-300]}), "outside 8 bits"),
    "an offset no symmetric grid has": (small_file({"name": "norm", "is_sym": True, "offset": [-5]}), "offset"),
    "a number without end": ('{"version": "1.0.0", "bw": ' + "9" * 5000 + "}", "usable"),
    "a million bits": (small_file({"name": "norm", "bw": 1_000_000}), "bits"),
    "32 bits for an activation": (small_file({"name": "norm", "bw": 32, "offset": [0]}), "32 bits"),
    "bits as text": (small_file({"name": "norm", "bw": "8"}), "bits"),
    "a name that is no text": (small_file({"name": ["norm"]}), "text"),
    "a name twice": (small_file({"name": "norm"}, {"name": "norm"}), "twice"),
    "a key twice": ('{"version": "1.0.0", "version": "2.0.0"}', "two entries"),
    "an unknown version": (small_file({"name": "norm"}, version="9.0.0"), "known are"),
    "a version that is no text": (small_file({"name": "norm"}, version=1), "text"),
    "no activations": ({"version": "1.0.0", "param_encodings": []}, "'activation_encodings'"),
    "an unknown kind of grid": (small_file({"name": "norm", "enc_type": "__import__('os')"}), "enc_type"),
    "channels for a tensor": (small_file({"name": "norm", "scale": [1.0, 2.0]}), "scales"),
    "a second entry that is bad": (small_file({"name": "norm"}, {"name": "head", "scale": [0]}), "not above 0"),
    "blocks for an activation": (
        small_file({"name": "norm", "enc_type": "PER_BLOCK", "block_size": 4}),
        "blocks",
    ),
    "a block size below 1": (small_file({"name": "norm", "enc_type": "PER_BLOCK", "block_size": -4}), "block_size"),
    "channels that the weight has not": (
        {**small_file(), "param_encodings": small_file({"name": "head.weight", **PER_CHANNEL})["activation_encodings"]},
        "5 channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_file_is_refused_with_a_sentence_and_nothing_is_applied(tmp_path, case):
    content, sentence = HOSTILE[case]
    with pytest.raises(InputError, match=sentence) as error:
        load_of(tmp_path, content)
    assert str(error.value).endswith((".", "?"))


STRANGE = [None, True, -1, 0, 1e300, 2**70, "", "x", "True", [], [1], [[1.0]], {}, {"0": {}}, {"bitwidth": 8}]


def damaged(text, generator):
    """The file with one value of its JSON replaced, one key renamed, or a stretch of its text cut out or doubled."""
    if generator.random() < 0.3:
        start, end = sorted(generator.choices(range(len(text)), k=2))
        return text[:start] + text[end:] if generator.random() < 0.5 else text[:end] + text[start:]
    content = json.loads(text)
    part = content
    for _ in range(generator.randint(1, 6)):
        key = generator.choice(list(part) if isinstance(part, dict) else range(len(part)))
        if isinstance(part[key], (dict, list)) and part[key] and generator.random() < 0.8:
            part = part[key]
            continue
        if isinstance(part, dict) and generator.random() < 0.3:
            part[generator.choice(["", "scale", "name", key + "_"])] = part.pop(key)
        else:
            part[key] = generator.choice(STRANGE)
        break
    return json.dumps(content)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_damaged_anywhere_is_taken_whole_or_refused_whole(tmp_path, reference_sim, form):
    sim = reference_sim("per_channel")
    sim.calibrate([recorded()["input"]])
    text = recorded_file("per_channel", form).read_text()
    generator, sentences = random.Random(0), []
    path = tmp_path / "damaged.encodings"
    before = everything(sim)
    for _ in range(60):
        path.write_text(damaged(text, generator))
        try:
            sim.load_encodings(path, names=NAMES.get(form))
        except (InputError, UnknownLayer) as error:
            sentences.append(str(error).rstrip())
            assert same(before, everything(sim)), "a refused file changed the sim"
        before = everything(sim)
        sim.output(recorded()["input"])
    assert len(sentences) > 20
    assert all(sentence.endswith((".", "?")) for sentence in sentences)


def test_an_error_while_grids_are_set_leaves_all_as_they_were(tmp_path, monkeypatch):
    sim, _ = varied()
    before = everything(sim)
    (tmp_path / "two.encodings").write_text(json.dumps(small_file({"name": "norm"}, {"name": "head"})))
    set_state = qlab.quantization.Quantizer.set_state

    def failing(quantizer, state):
        if quantizer.name == "head" and state.frozen:
            raise MemoryError("no memory left")
        set_state(quantizer, state)

    monkeypatch.setattr(qlab.quantization.Quantizer, "set_state", failing)
    with pytest.raises(MemoryError):
        sim.load_encodings(tmp_path / "two.encodings", freeze=True)
    assert same(before, everything(sim))


def test_a_flood_of_unknown_names_is_counted_and_the_first_are_told(tmp_path):
    content = small_file(*({"name": f"heat{number}"} for number in range(5000)))
    with pytest.raises(InputError, match="5000 entries without a place") as error:
        load_of(tmp_path, content)
    assert len(str(error.value)) < 1000
    _, loaded = load_of(tmp_path, content, strict=False)
    assert (len(loaded.unmatched), loaded.loaded) == (5000, {})
    assert "'head'" in loaded.unmatched["heat0"]
    assert len(repr(loaded).splitlines()) < 30


def test_a_huge_file_is_refused_unread(tmp_path):
    sim, _ = varied()
    with (tmp_path / "huge.encodings").open("wb") as file:
        file.truncate(1 << 33)  # sparse: takes no space
    with pytest.raises(InputError, match="8,589,934,592 bytes"):
        sim.load_encodings(tmp_path / "huge.encodings")


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path):
    sim, _ = varied()
    with pytest.raises(InputError, match="cannot be read"):
        sim.load_encodings(tmp_path / "none.encodings")
    (tmp_path / "bytes.encodings").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        sim.load_encodings(tmp_path / "bytes.encodings")


def test_compressed_block_scales_are_multiplied_out(tmp_path):
    """LPBQ: the scale of a block is a whole number times the scale of its channel."""
    steps = [[1, 2, 3, 16], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 1, 1, 1]]
    entry = {
        "name": "head.weight", "bw": 8, "compressed_bw": 4, "dtype": "INT", "enc_type": "LPBQ", "is_sym": True,
        "block_size": 4, "scale": [0.5, 1.0, 2.0, 4.0, 8.0], "offset": [-128] * 5,
        "per_block_int_scale": [step for row in steps for step in row],
    }  # fmt: skip
    sim, _ = load_of(tmp_path, {**small_file(), "param_encodings": [entry]})
    encoding = sim["head"].weight.encoding
    wanted = torch.tensor(steps) * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])[:, None]
    assert torch.equal(encoding.scale, wanted)
    assert (encoding.qmin, encoding.qmax, encoding.block_size) == (-8, 7, 4)
