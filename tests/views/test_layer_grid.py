"""The grid's half of the protocol: checked edits, sparse answers, refusals, replaced rows, still pictures."""

import fnmatch
import itertools
import json
import math
import subprocess
from pathlib import Path
from shutil import copy, which

import numpy as np
import pandas as pd
import pytest
import traitlets

import qlab.views
from qlab.views.cell_editors import Choice, EditRefused, Flag, Number, Text
from qlab.views.layer_grid import Column, LayerGrid

HOSTILE = "<img src=x onerror=alert(1)>"
COLUMNS = [
    Column("layer"),
    Column("bits", group="weight", editor=Choice((2, 4, 8, "float"))),
    Column("on", editor=Flag()),
    Column("limit", editor=Number(0, 1, optional=True), format=".2f"),
    Column("sqnr", format=".1f", bar=60),
]
ROWS = {
    "layer": ["conv", "add", "fc"],
    "bits": [8, None, 8],
    "on": [True, True, False],
    "limit": [0.5, math.nan, 1],
    "sqnr": [30.25, math.inf, np.float32(12.5)],
}


@pytest.fixture
def grid() -> LayerGrid:
    return LayerGrid(COLUMNS, ROWS, allowed={"bits": {"add": (), "fc": (4, 8)}}, label="layers")


@pytest.fixture
def steps(grid) -> list:
    calls: list = []
    grid.on_edit(lambda *edit: calls.append(edit))
    return calls


def edit(rows, column, value, **more):
    return {"kind": "edit", "id": 1, "rows": rows, "column": column, "value": value, **more}


def cells(sent) -> dict:
    """All cells that were sent, later ones over earlier ones."""
    merged: dict = {}
    for message, _ in sent:
        for column, values in message["cells"].items():
            merged.setdefault(column, {}).update(values)
    return merged


def test_an_edit_of_several_rows_is_one_step_and_one_answer(grid, steps, sent, from_browser):
    grid.on_edit(lambda rows, column, value: grid.patch({"sqnr": dict.fromkeys(rows, 25.0)}))
    from_browser(grid, edit(["conv", "fc"], "bits", "4"))
    assert steps == [(["conv", "fc"], "bits", 4)]
    cells_sent = {"bits": {"0": 4, "2": 4}, "sqnr": {"0": 25.0, "2": 25.0}}
    assert [message for message, _ in sent] == [{"kind": "patch", "cells": cells_sent, "answered": 1, "notice": ""}]


@pytest.mark.parametrize(
    ("rows", "column", "value", "sentence"),
    [
        (["conv"], "bits", "7", "Weight bits of conv takes 2, 4, 8 or float; got '7'."),
        (["fc"], "bits", "2", "Weight bits of fc takes 4 or 8; got '2'."),
        (["add"], "bits", "4", "Weight bits of add cannot be changed."),
        (["conv"], "sqnr", "4", "Sqnr of conv cannot be changed."),
        (["conv"], "limit", "2", "Limit of conv takes a number from 0 to 1 or nothing; got '2'."),
        (["conv"], "on", "maybe", "On of conv is on or off; got 'maybe'."),
        (["gone"], "bits", "4", "there is no row 'gone' in layers"),
        (["conv"], "gone", "4", "expected one of the columns layer, bits, on, limit, sqnr, got 'gone'"),
        ([], "bits", "4", "No row was named."),
    ],
)
def test_a_wrong_edit_is_refused_before_it_reaches_the_owner(
    grid, steps, sent, from_browser, rows, column, value, sentence
):
    from_browser(grid, edit(rows, column, value))
    assert grid.alert == sentence
    assert steps == []
    assert cells(sent) == {}
    assert sent[-1][0]["answered"] == 1


def test_rows_that_do_not_take_the_value_are_left_out_and_counted(grid, steps, sent, from_browser):
    from_browser(grid, edit(["conv", "add", "fc"], "bits", "2"))
    assert steps == [(["conv"], "bits", 2)]
    assert sent[-1][0]["notice"] == "2 of the selected rows do not take it."


def test_a_refusal_by_the_owner_puts_the_old_value_back(grid, sent, from_browser):
    @grid.on_edit
    def refuse(rows, column, value):
        grid.patch({"sqnr": {"conv": 1.0}})
        raise ValueError("4 bits need a calibrated layer")

    from_browser(grid, edit(["conv"], "bits", "4"))
    assert grid.alert == "4 bits need a calibrated layer"
    assert grid.value("conv", "bits") == 8
    assert cells(sent)["bits"] == {"0": 8}
    from_browser(grid, edit(["conv"], "bits", "7"))
    assert grid.alert.startswith("Weight bits")


def test_any_other_exception_is_shown_as_well(grid, from_browser):
    grid.on_edit(lambda *edit: 1 / 0)
    from_browser(grid, edit(["conv"], "bits", "4"))
    assert grid.alert == "ZeroDivisionError: division by zero"
    assert grid.value("conv", "bits") == 8


def test_edits_are_applied_in_the_order_in_which_they_were_made(grid, steps, from_browser):
    for number, value in ((1, "4"), (3, "2"), (0, "8"), (2, "float")):
        from_browser(grid, edit(["conv"], "bits", value, turn=("tab", number)))
    assert [value for _, _, value in steps] == [8, 4, "float", 2]


def test_an_edit_that_fails_does_not_hold_up_the_next(grid, steps, from_browser):
    @grid.on_edit
    def fail_at_8(rows, column, value):
        if value == 8:
            raise RuntimeError("broken")

    from_browser(grid, edit(["conv"], "bits", "4", turn=("tab", 1)))
    from_browser(grid, edit(["conv"], "bits", "8", turn=("tab", 0)))
    assert [value for _, _, value in steps] == [8, 4]
    assert grid.value("conv", "bits") == 4


def test_an_edit_that_succeeds_clears_the_last_refusal(grid, from_browser):
    from_browser(grid, edit(["conv"], "bits", "7"))
    from_browser(grid, edit(["conv"], "bits", "4"))
    assert grid.alert == ""


def test_the_owner_may_correct_the_value(grid, sent, from_browser):
    grid.on_edit(lambda rows, column, value: grid.patch({"bits": {"conv": 2}}))
    from_browser(grid, edit(["conv"], "bits", "4"))
    assert cells(sent)["bits"] == {"0": 2}


def test_undo_and_redo_call_back_and_may_refuse(grid, from_browser):
    calls = []
    grid.on_undo(lambda: calls.append("undo"))

    @grid.on_redo
    def redo():
        raise ValueError("nothing to redo")

    from_browser(grid, {"kind": "undo"})
    from_browser(grid, {"kind": "redo"})
    assert calls == ["undo"]
    assert grid.alert == "nothing to redo"


def test_patches_are_sparse_and_small(sent):
    rows = {"layer": [f"layer{i}" for i in range(300)], "sqnr": [0.0] * 300}
    grid = LayerGrid([Column("layer"), Column("sqnr")], rows)
    grid.patch({"sqnr": {"layer299": 12.5}})
    assert sent[0][0] == {"kind": "patch", "cells": {"sqnr": {"299": 12.5}}}
    with pytest.raises(ValueError, match="no row 'layer300'"):
        grid.patch({"sqnr": {"layer300": 1.0}})


def test_a_snapshot_is_current_json_without_nan_or_infinity(grid):
    grid.patch({"sqnr": {"conv": -math.inf}})
    snapshot = grid.get_state("_snapshot")["_snapshot"]
    json.dumps(snapshot, allow_nan=False)
    assert snapshot["rows"]["sqnr"] == ["-Infinity", "Infinity", 12.5]
    assert snapshot["rows"]["limit"] == [0.5, None, 1]
    assert snapshot["allowed"] == {"bits": {"1": [], "2": [4, 8]}}


def test_a_data_frame_will_do():
    frame = pd.DataFrame({"layer": ["a", "b"], "bits": pd.array([4, None], dtype="Int64"), "on": [True, False]})
    grid = LayerGrid([Column("layer"), Column("bits"), Column("on")], frame)
    assert [grid.value(row, column) for row in "ab" for column in ("bits", "on")] == [4, True, None, False]
    json.dumps(grid.take_snapshot(), allow_nan=False)


def test_limits_can_be_set_and_lifted_later(grid, steps, from_browser):
    grid.allow("bits", {"add": None, "conv": ()})
    from_browser(grid, edit(["add", "conv"], "bits", "2"))
    assert steps == [(["add"], "bits", 2)]


def test_replaced_rows_keep_the_selection_of_those_that_stay(grid, sent):
    grid.selected = ["conv", "fc"]
    grid.reset({**ROWS, "layer": ["conv", "relu", "head"]})
    assert grid.selected == ["conv"]
    assert grid.rows == ["conv", "relu", "head"]
    assert sent[-1][0]["kind"] == "reset"


def test_selecting_an_unknown_row_is_an_error_in_python_only(grid):
    with pytest.raises(traitlets.TraitError, match="no row 'conv9'"):
        grid.selected = ["conv9"]
    grid.set_state({"selected": ["conv9", "fc"]})
    assert grid.selected == ["fc"]


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ([Column("layer"), Column("x")], {"layer": ["a"]}, "none for x"),
        ([Column("layer")], {"layer": ["a", "a"]}, "'a' twice"),
        ([Column("layer"), Column("x")], {"layer": ["a"], "x": [1, 2]}, "one length"),
        ([], {}, "none for any"),
    ],
)
def test_rows_that_do_not_fit_are_refused(columns, rows, message):
    with pytest.raises(ValueError, match=message):
        LayerGrid(columns, rows)


def test_a_format_that_the_browser_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"such as '\.1f'"):
        Column("x", format=">10s")


def test_the_still_picture_is_escaped_short_and_says_how_many_more():
    rows = {"layer": [f"{HOSTILE}{i}" for i in range(300)], "x": [0.5] * 300}
    columns = [Column("layer", title=HOSTILE), Column("x", format=".1%")]
    data, _ = LayerGrid(columns, rows, label=HOSTILE)._repr_mimebundle_()
    assert data["text/plain"] == f"LayerGrid({HOSTILE!r}, 300 rows, 2 columns)"
    assert "<img" not in data["text/html"]
    assert data["text/html"].count("<tr>") == 13
    assert "288 more" in data["text/html"]
    assert "50.0%" in data["text/html"]
    assert len(json.dumps(data)) < 5000


def test_texts_are_one_line_of_limited_length():
    assert Text(20).accept("  two\n words ") == "two words"
    with pytest.raises(EditRefused, match="at most 3 characters; got 4"):
        Text(3).accept("four")


@pytest.mark.parametrize("typed", ["nan", "inf", "", "x", None, [1]])
def test_numbers_are_finite(typed):
    with pytest.raises(EditRefused):
        Number().accept(typed)


def in_node(tmp_path: Path, expression: str) -> list:
    """The JSON value of an expression over what layer_grid.js exports."""
    if which("node") is None:
        pytest.skip("no node to run JavaScript with")
    copy(Path(qlab.views.__file__).parent / "layer_grid.js", tmp_path / "grid.mjs")
    script = f"import * as grid from './grid.mjs'; console.log(JSON.stringify({expression}))"
    command = ["node", "--input-type=module", "--eval", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_numbers_look_the_same_in_the_browser_and_in_the_still_picture(tmp_path):
    specs = ["", "d", ",d", "+d", ".1f", "+,.2f", ".0%", "+.1%", ".3g", ",.1f", "f"]
    values = [0, 7, -42, 2304, 1234567, 0.123, -0.0312, 99.9, 1e-7, 123456.789, -1234.56, 3.0, 1e21]
    pairs = [(value, spec) for value, spec in itertools.product(values, specs) if abs(value) < 1e20 or spec == ".3g"]
    shown = in_node(tmp_path, f"{json.dumps(pairs)}.map(([value, spec]) => grid.formatNumber(value, spec))")
    assert shown == [Column("x", format=spec).text(value) for value, spec in pairs]


def test_globs_match_as_in_python(tmp_path):
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer12.conv1", "layer2.0.add", "fc", "a[0]", "x\\y"]
    globs = ["layer1.*", "*.conv?", "layer[!1]*", "layer[12]*conv1", "*conv[0-1]", "fc*", "a[[]0]", "*\\*", "*(*", "f?"]
    expression = f"{json.dumps(globs)}.map((glob) => {json.dumps(names)}.filter((n) => grid.matcher(glob)(n, '')))"
    assert in_node(tmp_path, expression) == [fnmatch.filter(names, glob) for glob in globs]


def test_names_sort_by_their_numbers(tmp_path):
    assert in_node(tmp_path, "['layer10', 'layer9', 'fc', 'layer1'].sort(grid.compare)") == [
        "fc",
        "layer1",
        "layer9",
        "layer10",
    ]
