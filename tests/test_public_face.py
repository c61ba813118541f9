"""The public face as it is promised: the lines a reader meets first run as written, and the README's first use does."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import qlab

FACE = """
findings = qlab.validate(model, example)
sim = qlab.QuantSim(model, example, qlab.presets.w8a8())
sim.calibrate(batches)
y = sim(x)
print(sim)

sim["layer1.0.conv1"].weight.bits = 4
sim["layer1.0.conv1"].weight.granularity = "per_channel"
sim["layer1.0.add"].output.rule = "percentile"
sim["fc"].output.enabled = False
sim.configure("layer2.*", weight={"bits": 4}, output={"bits": 8})
table = sim.to_pandas()

score = qlab.Accuracy(labelled)
scores = sim.evaluate(score), sim.evaluate(score, quantized=False)

qlab.BatchNormFolding().apply(sim)
qlab.CrossLayerEqualization().apply(sim, batches)
qlab.BiasCorrection().apply(sim, batches)
qlab.AdaRound(iterations=1000).apply(sim, batches)
qlab.SequentialMSE().apply(sim, batches)
qlab.BatchNormReestimation(batches=100).apply(sim, batches)
qlab.QAT(mode="range_learning", epochs=1).apply(sim, labelled)
result = qlab.AutoQuant(allowed_drop=0.01).apply(sim, batches, score=score)

analysis = qlab.QuantAnalyzer().measure(sim, batches, score=score)
analysis.save("report.html")

exported = sim.export("out/resnet18")
sim.load_encodings("out/resnet18.encodings")
check = qlab.on_target(sim, "out/resnet18.onnx", batches)
sim.save("sim.safetensors"); again = qlab.load("sim.safetensors", model, example)

lab = qlab.Lab(sim, batches, score=score)
lab.run(qlab.AdaRound())
job = lab.start(qlab.AdaRound())
job.result()
lab.undo(); lab.redo(); print(lab.script())
views = qlab.views.LayerTable(lab), qlab.views.Histogram(lab), qlab.views.Sensitivity(lab)
"""


@pytest.fixture
def given() -> dict[str, object]:
    """What a reader of the lines has: a model, an example, batches with and without labels."""
    images = qlab.examples.digits()
    labelled = [(x, y) for x, y in images.test][:2]
    batches = [x for x, _ in labelled]
    return {
        "qlab": qlab,
        "model": qlab.examples.resnet(),
        "example": batches[0],
        "x": batches[0],
        "batches": batches,
        "labelled": labelled,
    }


@pytest.mark.slow
def test_the_promised_lines_run_as_written(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    exec(FACE, given)
    told = capsys.readouterr().out
    assert "layer1.0.conv1" in told
    assert "qlab.AdaRound(" in told
    assert given["y"].shape == (len(given["x"]), 10)
    assert isinstance(given["table"], pd.DataFrame)
    assert given["table"].query("layer == 'fc' and part == 'output'")["enabled"].tolist() == [False]
    assert isinstance(given["result"].stages, pd.DataFrame)
    assert given["result"].best is not None
    assert {p.name for p in Path("out").iterdir()} >= {"resnet18.onnx", "resnet18.float.onnx", "resnet18.encodings"}
    assert "<html" in Path("report.html").read_text().lower()
    for name, value in given["model"].state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the user's model was changed"


def test_the_first_use_in_the_readme_runs_as_written(given):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"## First use\s+```python\n(.*?)```", readme, re.S)
    assert code is not None
    exec(code[1], given)
    assert given["sim"]["layer1.0.conv1"].weight.bits == 4
    assert given["lab"].sim is given["sim"]
