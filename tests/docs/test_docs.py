"""The pages: their links lead somewhere, their tables are those of the declarations, their code runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import qlab
from qlab.techniques import TECHNIQUES

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
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


def test_what_the_page_on_extending_shows_works():
    """A technique, a view and a step of the guidebook, each as written there."""
    from qlab.lab.guidebook import STEPS
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


def test_badges_open_what_there_is_and_are_replaced_not_added():
    badges = module("badges")
    names = [path.stem for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb"))]
    for page, text in (
        ("README.md", badges.binder("someone/qlab", "v1")),
        ("docs/tutorials.md", badges.colab("someone/qlab", "v1", names)),
    ):
        once = badges.placed((REPOSITORY / page).read_text(encoding="utf-8"), text)
        assert once.count(text) == 1
        assert badges.placed(once, text) == once
        opened = re.findall(r"\]\(https://\S*?(notebooks/\w+\.ipynb)\)", text)
        assert opened
        assert all((REPOSITORY / path).exists() for path in opened)
    assert "someone/qlab/v1?urlpath=lab/tree/notebooks/00_tour.ipynb" in badges.binder("someone/qlab", "v1")
    assert "%pip install -q git+https://github.com/someone/qlab@v1" in badges.colab("someone/qlab", "v1", names)


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
