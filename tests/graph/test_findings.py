"""Findings: a list, a table and text of what was found, the worst first, with every name escaped."""

import pytest

from qlab.graph.findings import Finding, Findings, Note, Rules, Severity

HINT = Finding("QL109", Severity.HINT, None, "", "a batch of one", "no statistics", "give more")
ERROR = Finding("QL104", Severity.ERROR, "conv", "net.py:7", "a branch", "one path", "torch.where")


def test_the_worst_comes_first_and_slices_stay_findings():
    found = Findings([HINT, ERROR])
    assert [finding.code for finding in found] == ["QL104", "QL109"]
    assert isinstance(found[:1], Findings)
    assert found[0] is ERROR


def test_an_error_stands_in_the_way_and_a_hint_does_not():
    assert not Findings([HINT, ERROR]).ok
    assert Findings([HINT]).ok
    assert Findings().ok


def test_findings_are_chosen_by_severity_code_and_layer():
    found = Findings([HINT, ERROR])
    assert list(found.of("error")) == list(found.of(Severity.ERROR)) == [ERROR]
    assert list(found.where(code="QL109")) == [HINT]
    assert list(found.where(layer="conv")) == [ERROR]
    assert list(found.where("QL109", layer="conv")) == []
    with pytest.raises(ValueError, match="fatal"):
        found.of("fatal")


def test_the_table_has_a_row_a_finding_and_keeps_its_columns_when_empty():
    frame = Findings([HINT, ERROR]).to_pandas()
    assert frame["code"].tolist() == ["QL104", "QL109"]
    assert frame["severity"].tolist() == ["error", "hint"]
    assert list(Findings().to_pandas().columns) == list(frame.columns)


def test_text_says_what_where_why_and_how_to_mend_it():
    text = repr(Findings([HINT, ERROR]))
    assert text.splitlines()[0] == "Findings: 1 error, 1 hint"
    assert "QL104 error 'conv' at net.py:7\n  a branch\n  Why: one path\n  Mend: torch.where" in text
    assert repr(Findings()) == "Findings: none; the model is ready to be quantized"


def test_html_escapes_names():
    finding = Finding("QL104", Severity.ERROR, "<script>alert(1)</script>", "a&b.py:1", "<b>", "", "")
    page = Findings([finding])._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a&amp;b.py:1" in page


def test_a_rule_gives_its_own_words_where_the_note_has_none():
    rules = Rules()

    @rules.rule("QL999", Severity.HINT, "A title", "why", "mend")
    def look(subject):
        yield Note(f"saw {subject}")
        yield Note("worse", remedy="other", severity=Severity.WARNING)

    first, second = rules.apply("it")
    assert (first.what, first.severity, first.remedy) == ("saw it", Severity.HINT, "mend")
    assert (second.severity, second.remedy, second.why) == (Severity.WARNING, "other", "why")
