"""What a Binder or a development container is told to install is what was tested, and all that the tutorials need."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BINDER = REPOSITORY / "binder"


def pins(path: Path) -> dict[str, str]:
    """Package to version, of the lines that pin one."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {_normal(name): version for name, version in lines}


def test_it_installs_the_versions_that_were_tested():
    tested = pins(REPOSITORY / "constraints.txt")
    for name, version in pins(BINDER / "requirements.txt").items():
        assert tested.get(name) == version, name


def test_it_installs_all_that_qlab_and_its_tutorials_need():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["hub"], "ipykernel"]
    names = {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in needed}
    assert names <= set(pins(BINDER / "requirements.txt"))


def test_it_takes_torch_without_cuda_and_nothing_from_this_folder():
    lines = [line for line in (BINDER / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    options = [line for line in lines if not re.fullmatch(r"[\w.-]+==\S+", line)]
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    assert not [line for line in lines if re.search("nvidia|cuda|triton", line)]


def test_its_python_is_one_that_qlab_takes():
    runtime = (BINDER / "runtime.txt").read_text().strip()
    assert re.fullmatch(r"python-3\.(1[1-9])", runtime)


def test_its_scripts_can_be_run():
    for name in ("postBuild", "start"):
        assert os.access(BINDER / name, os.X_OK)
        assert (BINDER / name).read_text().startswith("#!/bin/bash\n")


def test_repo2docker_accepts_it_without_a_network(tmp_path: Path):
    program = shutil.which("jupyter-repo2docker", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("jupyter-repo2docker is not installed (pip install qlab[dev])")
    source = tmp_path / "source"  # a copy without environments and caches
    shutil.copytree(BINDER, source / "binder")
    hook = str(REPOSITORY / "tests" / "notebooks" / "offline")
    command = [program, "--no-build", "--debug", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": hook}, cwd=tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-2000:]
    version = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    assert f"python={version}" in told
    for step in ('-r "binder/requirements.txt"', "RUN ./binder/postBuild", "/binder/start"):
        assert step in told


def test_the_development_container_installs_the_same():
    told = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    assert "binder/requirements.txt" in told["postCreateCommand"]
    assert "--no-deps --editable ." in told["postCreateCommand"]
    runtime = (BINDER / "runtime.txt").read_text().strip()
    assert told["image"].split(":")[1] == runtime.removeprefix("python-")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
