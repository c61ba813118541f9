"""What a user gets: the wheel in a fresh environment, its command, its tutorials, the job in a terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

import qlab
from qlab.__main__ import copy_tutorials, main

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = {path.name: path.read_bytes() for path in (REPOSITORY / "notebooks").glob("*.ipynb")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel of qlab in it; what qlab needs is borrowed from ours."""
    folder = tmp_path_factory.mktemp("package")
    source, python = folder / "source", folder / "venv" / "bin" / "python"
    source.mkdir()
    for name in ("qlab", "notebooks"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)  # the wheel from the sdist
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    wheel = next(folder.glob("*.whl"))
    _run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", "--quiet", wheel)
    where = _run(python, "-c", "import qlab; print(qlab.__file__)")
    assert where.startswith(str(site)), "the environment runs another qlab than the wheel's"
    return python.parent


def test_the_command_tells_its_version(environment: Path):
    assert _run(environment / "qlab", "--version").split() == ["qlab", qlab.__version__]


def test_the_wheel_brings_every_tutorial(environment: Path, tmp_path: Path):
    _run(environment / "qlab", "lab", tmp_path / "mine", "--copy-only")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == NOTEBOOKS


def test_qlab_lab_serves_the_tutorials_on_loopback_alone(environment: Path, tmp_path: Path):
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [environment / "qlab", "lab", tmp_path / "mine", "--", "--no-browser", "--port=0"]
    with subprocess.Popen(command, env=_environment(places), stderr=subprocess.PIPE, text=True) as process:
        try:
            server = _server_of(tmp_path / "RUNTIME", process)
            assert "127.0.0.1" in server["url"]
            url = f"{server['url']}api/contents/00_tour.ipynb?content=0"
            asked = urllib.request.Request(url, headers={"Authorization": f"token {server['token']}"})
            with urllib.request.urlopen(asked) as reply:
                assert json.load(reply)["name"] == "00_tour.ipynb"
        finally:
            if found := list((tmp_path / "RUNTIME").glob("jpserver-*.json")):
                os.kill(json.loads(found[0].read_text())["pid"], 15)
            process.kill()


@pytest.mark.slow
def test_the_job_in_a_terminal_takes_a_network_from_chance_to_float_and_exports_it(environment: Path, tmp_path: Path):
    report = _run(environment / "python", "-m", "qlab.examples", "--out", tmp_path)
    floating, quantized = (_percent(report, name) for name in ("float", "W8A8"))
    assert quantized < 20 < 98 < floating
    recovered = report.partition("equalize")[2].splitlines()[1]
    assert float(recovered.split("%")[0]) > floating - 1
    assert {path.suffix for path in tmp_path.iterdir()} >= {".onnx", ".encodings"}
    assert int(re.search(r"^(\d+) s\. Next: qlab lab", report, re.MULTILINE)[1]) < 60


def test_a_tutorial_that_was_changed_is_kept_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy_tutorials(tmp_path)
    (tmp_path / "01_what_quantization_does.ipynb").write_text("mine")
    assert main(["lab", str(tmp_path), "--copy-only"]) == 0
    assert (tmp_path / "01_what_quantization_does.ipynb").read_text() == "mine"
    assert "Left as you changed them: 01_what_quantization_does.ipynb" in capsys.readouterr().out
    main(["lab", str(tmp_path), "--copy-only", "--overwrite"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == NOTEBOOKS


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    assert main(["lab", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_without_jupyterlab_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lab", str(tmp_path)]) == 2
    assert 'pip install "qlab[lab]"' in capsys.readouterr().err


def _percent(report: str, name: str) -> float:
    return next(float(line.split()[1].rstrip("%")) for line in report.splitlines() if line.startswith(name))


def _server_of(folder: Path, process: subprocess.Popen) -> dict:
    for _ in range(240):
        for path in folder.glob("jpserver-*.json"):
            if text := path.read_text():
                return json.loads(text)
        if process.poll() is not None:
            break
        time.sleep(0.25)
    process.kill()
    raise AssertionError(f"no server: {process.stderr.read()[-2000:]}")


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Ours without the path to the repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (more or {})


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], env=_environment(), capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()
