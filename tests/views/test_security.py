"""Nothing that comes from a browser, a model or an error is run: neither as Python nor as part of the page."""

import ast
import re
from pathlib import Path

import pytest

import qlab

PACKAGE = Path(qlab.__file__).parent
PYTHON = sorted(PACKAGE.rglob("*.py"))
JAVASCRIPT = sorted(PACKAGE.rglob("*.js"))
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|srcdoc|\.html\(")
RUNS_SCRIPT = re.compile(r"\beval\s*\(|new Function\(.*|set(?:Timeout|Interval)\(\s*[\"'`]|javascript:")
BOKEHJS = "new Function(await new Response(stream).text()).call(scope);"  # code of the package, sent by the kernel


def calls_of(source: str) -> set[str]:
    """The names that a module calls as they stand; methods, such as a module's eval(), are something else."""
    found = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {function.id for function in found if isinstance(function, ast.Name)}


def test_the_search_finds_what_it_looks_for() -> None:
    assert calls_of("value = eval(message['text'])") & RUNS_TEXT
    assert not calls_of("model.eval()") & RUNS_TEXT
    assert MARKUP.search("cell.innerHTML = name")
    assert RUNS_SCRIPT.search("eval(message.code)")
    assert len(PYTHON) > 100
    assert {"bokeh_pane.js", "frame.js", "layer_grid.js"} <= {path.name for path in JAVASCRIPT}


def test_no_text_becomes_python() -> None:
    assert {path.name for path in PYTHON if calls_of(path.read_text(encoding="utf-8")) & RUNS_TEXT} == set()


@pytest.mark.parametrize("path", JAVASCRIPT, ids=lambda path: path.name)
def test_no_text_becomes_markup_or_script(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert MARKUP.findall(code) == []
    assert RUNS_SCRIPT.findall(code) == ([BOKEHJS] if path.name == "bokeh_pane.js" else [])
