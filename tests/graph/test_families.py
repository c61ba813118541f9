"""Breadth: every family is captured bit for bit, leaves no step unexplained, and can be simulated.

Hugging Face families need transformers (the extra `hub`) and are skipped without it.
"""

import importlib.util

import pytest

from tests.graph.families import FAMILIES
from tests.graph.families.family import Family, examine

if importlib.util.find_spec("transformers"):
    from tests.graph.families.hugging_face import FAMILIES as HUGGING_FACE
else:
    HUGGING_FACE = []


@pytest.mark.parametrize("family", [*FAMILIES, *HUGGING_FACE], ids=str)
def test_a_family_is_captured_bit_for_bit_explained_and_simulated(family: Family):
    outcome = examine(family)
    assert outcome.exact
    assert outcome.unexplained == ()
    assert outcome.finite
    assert outcome.sqnr > 10  # dB; untrained deep nets amplify noise, so only the order of magnitude says something


@pytest.mark.skipif(bool(HUGGING_FACE), reason="transformers is installed")
def test_hugging_face_families():
    pytest.skip("transformers is not installed: pip install qlab[hub]")
