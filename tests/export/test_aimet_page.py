"""The page that maps AIMET's calls: every name and setting of qlab on it exists."""

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qlab

PAGE = (Path(__file__).parents[2] / "docs" / "aimet.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([^`]*(?:qlab|sim|lab|result|analysis)[.(\[][^`]*)`", PAGE)))
OURS = [code for row in re.findall(r"^\|.*\|$", PAGE, re.M) for code in re.findall(r"`([^`]+)`", row.split("|")[2])]


def calls(code):
    """Calls of qlab.* in a piece of code, as (dotted name, keyword names)."""
    try:
        tree = ast.parse(code.replace("...", "x"))
    except SyntaxError:
        return []
    found = [(ast.unparse(n.func), {k.arg for k in n.keywords}) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [(name, keywords) for name, keywords in found if re.fullmatch(r"qlab(\.\w+)+", name)]


def test_the_page_is_about_something():
    assert len(OURS) > 40
    assert len({name for code in OURS for name, _ in calls(code)}) > 15


@pytest.mark.parametrize("name", sorted({n for c in CODE for n in re.findall(r"\bqlab\.\w+(?:\.\w+)?", c)}))
def test_every_name_exists(name):
    assert functools.reduce(getattr, name.split(".")[1:], qlab) is not None


def test_every_setting_of_a_call_exists():
    for code in OURS:
        for name, keywords in calls(code):
            function = functools.reduce(getattr, name.split(".")[1:], qlab)
            missing = keywords - set(inspect.signature(function).parameters)
            assert not missing, f"{name} has no {missing}"


def test_every_method_and_attribute_of_a_sim_exists():
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    for code in OURS:
        for name in re.findall(r"\bsim\.(\w+)", re.sub('"[^"]*"', "", code)):
            assert hasattr(sim, name), name
        for part, name in re.findall(r'sim\["\w+"\]\.(weight|output)\.(\w+)', code):
            assert hasattr(getattr(sim["0"], part), name), name
