"""The pages: their links lead somewhere, their tables are those of the declarations, their code runs."""

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from torch import nn

import qlab
from qlab.plots import Plot
from qlab.techniques import TECHNIQUES

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PARTS = ("sim", "quantization", "techniques", "analysis", "lab", "views", "plots", "examples")
ROOMS = ["qlab", *(f"qlab.{name}" for name in PARTS)]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def module(name: str) -> ModuleType:
    """A file beside the pages, which is no part of a package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def anchors(page: Path) -> set[str]:
    """What its headings are called in a link."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_its_relative_links_lead_to_files_and_headings_that_there_are(page: Path):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_technique_has_a_section_with_its_settings_as_declared():
    tables = module("tables")
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.with_tables(page) == page, "run: python docs/tables.py"
    named = set(re.findall(r"<!-- settings: (\w+) -->", page))
    ours = {name for name, technique in TECHNIQUES.items() if technique.__module__.startswith("qlab.techniques.")}
    assert ours | {"QuantAnalyzer"} == named


def test_a_default_in_the_table_is_the_one_in_the_class():
    """By hand, for the generator could be wrong on both sides."""
    rows = module("tables").table("AdaRound").splitlines()
    assert rows[2].startswith("| `method` | `'auto'` | how roundings are found (one of `auto`, `gram`, `sgd`)")
    assert any(row.startswith("| `iterations` | none |") for row in rows)


def test_examples_in_docstrings_stand_in_fences():
    pytest.importorskip("griffe")
    text = "Adds.\n\n>>> 1 + 1\n2\n\nAnd so on."
    assert module("doctests").fenced(text) == "Adds.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nAnd so on."


def test_the_prose_names_only_what_there_is():
    """Names after `qlab.`; and in the table of symptoms, every error and technique."""
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
            for path in re.findall(r"\bqlab((?:\.\w+)+)", code):
                thing = qlab
                for part in path[1:].split("."):
                    assert hasattr(thing, part), f"{page.name}: qlab{path}"
                    thing = getattr(thing, part)
    symptoms = (REPOSITORY / "docs" / "symptoms.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]\w+[a-z]\w*)`", symptoms))
    errors = {error.__name__ for error in qlab.errors.QlabError.__subclasses__()}
    assert {"CaptureError", "DivergedLoss", "AdaRound"} <= named
    assert named <= errors | set(dir(qlab))


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_everything_public(room: str):
    """What a room exports; a figure's class is told by the function that draws it."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs" / "api").glob("*.md"))
    told = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    exported = importlib.import_module(room)
    names = [name for name in dir(qlab) if name[0] != "_"] if room == "qlab" else exported.__all__
    found = [getattr(exported, name) for name in names]
    ours = [f"{thing.__module__}.{thing.__qualname__}" for thing in found if is_ours(thing)]
    assert len(ours) > 3
    assert not [name for name in ours if not any(name == page or name.startswith(f"{page}.") for page in told)]


def is_ours(thing: object) -> bool:
    if inspect.isclass(thing) and issubclass(thing, Plot):
        return thing is Plot
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("qlab")


def test_what_the_page_on_extending_shows_works():
    """A technique, a view and a step of the guidebook, each as written there."""
    from qlab.lab.guidebook_steps import STEPS
    from qlab.views import TABS

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    batches = [torch.randn(16, 4)]
    lab = qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)
    known: dict = {"__name__": "__main__"}
    before = set(TECHNIQUES), set(TABS), set(STEPS)
    try:
        for number, code in enumerate(CODE.findall((REPOSITORY / "docs" / "extend.md").read_text(encoding="utf-8"))):
            path = f"extend.md, example {number}"
            exec(compile(code, path, "exec"), known)
        low, high = (getattr(lab.sim["0"].output.encoding, name) for name in ("minimum", "maximum"))
        lab.run(known["Widen"](share=0.5))
        wide = lab.sim["0"].output.encoding
        step = float(wide.scale)
        assert float(wide.maximum) == pytest.approx(1.5 * float(high), abs=step)
        assert float(wide.minimum) == pytest.approx(1.5 * float(low), abs=step)
        view = known["Size"](lab)
        assert view.to_html() == f"{lab.size() / 1024:.1f} KiB"
        view.close()
        assert qlab.guidebook(lab).step("bias").next == "layers"
    finally:
        for registry, names in zip((TECHNIQUES, TABS, STEPS), before, strict=True):
            for name in set(registry) - names:
                del registry[name]


@pytest.fixture
def addressed(tmp_path: Path) -> Path:
    """A copy of the pages and tutorials, after their badges were written for one tag and then for another."""
    for name in ("docs", "notebooks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    badges = module("badges")
    badges.main(["someone/qlab", "v1"], tmp_path)
    badges.main(["someone/qlab", "v2"], tmp_path)
    return tmp_path


def test_badges_open_what_there_is_and_are_replaced_not_added(addressed: Path):
    readme, tutorials = ((addressed / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tutorials.md"))
    tour = "https://mybinder.org/v2/gh/someone/qlab/v2?urlpath=lab/tree/notebooks/00_tour.ipynb"
    assert readme.count(f"(https://mybinder.org/badge_logo.svg)]({tour})") == readme.count("mybinder.org/v2") == 1
    start = re.escape("https://colab.research.google.com/github/someone/qlab/blob/v2/notebooks/")
    opened = re.findall(rf"\]\({start}(\w+\.ipynb)\)", tutorials)
    assert opened == sorted(path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
    assert "qlab/v1" not in readme + tutorials


def test_each_tutorial_gets_one_cell_that_installs_in_colab_and_does_nothing_elsewhere(
    addressed: Path, monkeypatch: pytest.MonkeyPatch
):
    for path in sorted((addressed / "notebooks").glob("*.ipynb")):
        notebook, ours = (nbformat.read(found, as_version=4) for found in (path, REPOSITORY / "notebooks" / path.name))
        nbformat.validate(notebook)
        assert [cell for cell in notebook.cells if cell.id != "colab"] == ours.cells
        assert notebook.cells[1].id == "colab"
        assert asked_by(notebook.cells[1].source) == []
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "google", ModuleType("google"))
            patched.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
            extra = "[hub]" if path.stem == "12_transformer" else ""
            wanted = f'install -q "qlab{extra} @ git+https://github.com/someone/qlab@v2"'
            assert asked_by(notebook.cells[1].source) == [("pip", wanted), "widgets"]


def asked_by(cell: str) -> list:
    """What a cell asks of IPython, and of Colab if that is there, when it runs."""
    asked: list = []
    shell = SimpleNamespace(run_line_magic=lambda *told: asked.append(told))
    if colab := sys.modules.get("google.colab"):
        colab.output = SimpleNamespace(enable_custom_widget_manager=lambda: asked.append("widgets"))
    exec(TransformerManager().transform_cell(cell), {"get_ipython": lambda: shell})
    return asked


@pytest.mark.slow
def test_the_site_is_built_strictly_and_names_nothing_of_the_network(tmp_path: Path):
    pytest.importorskip("material")
    hook = REPOSITORY / "tests" / "notebooks" / "offline"  # refuses every connection
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {"PYTHONPATH": str(hook), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?://[^\"' >]+)", page.read_text()
        )
        assert not loaded, (page.name, loaded)
    assert "QuantSim.calibrate" in (tmp_path / "api" / "sim.html").read_text()
