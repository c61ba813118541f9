"""The table is what the results say, on the pages too; a program goes on where it was stopped."""

import importlib.util
import json
import re

import pytest

from benchmarks import __main__ as program
from benchmarks import table
from benchmarks.measuring import middle, ratio
from benchmarks.record import Record, state_of_code

ONE = {"ratio": 1.0, "low": 0.9, "high": 1.1}
TWO = {"ratio": 2.0, "low": 2.0, "high": 2.0}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", table.PAGES)
def test_a_page_shows_the_results_that_are_kept(page):
    text, wanted = table.placed(page)
    assert len(table.BETWEEN.findall(text)) == 1
    assert text == wanted, "run: python -m benchmarks --readme"


def test_what_is_measured_is_not_measured_again_until_qlab_changes(results):
    record = Record("engine")
    assert record.lacks("resnet18", 1, "forward")
    record.add("resnet18", 1, "forward", {"a": ONE, "b": TWO})
    for step, threads, is_lacking in (("forward", 1, False), ("forward", 2, True), ("edit", 1, True)):
        assert Record("engine").lacks("resnet18", threads, step) == is_lacking
    assert Record("engine", again=True).lacks("resnet18", 1, "forward")
    assert Record("engine", of="another state").lacks("resnet18", 1, "forward")
    assert len(state_of_code()) == 12


def test_a_step_measured_again_replaces_all_of_its_rows_and_no_other(results):
    record = Record("engine")
    record.add("resnet18", 1, "forward", {"a": ONE, "b": ONE})
    record.add("resnet18", 2, "forward", {"a": ONE})
    record.add("resnet18", 1, "edit", {"c": ONE})
    record.add("resnet18", 1, "forward", {"a": TWO})
    kept = json.loads((results / "engine.json").read_text())
    assert kept["rows"] == {"resnet18": {"a": {"1": TWO, "2": ONE}, "c": {"1": ONE}}}
    assert kept["machine"]["cores"] >= 1


def test_nothing_is_written_unless_asked(results):
    record = Record("engine", keep=False)
    record.add("resnet18", 1, "forward", {"a": ONE})
    assert not list(results.iterdir())


def test_rows_of_all_programs_stand_in_one_table(results):
    for name, row, values in (("qat", "step", TWO), ("engine", table.FORWARD, ONE), ("aimet", table.FORWARD, TWO)):
        record = Record(name)
        record.add("resnet18", 1, "x", {row: values})
    told = table.whole().splitlines()
    assert told[0] == "|  | 1 thread | at most | AIMET 2.42, 1 thread |"
    assert told[2] == "| **ResNet-18, 8 images of 224 px** | | | |"
    assert told[3] == "| sim forward / float forward | 1 (0.9 to 1.1) | 1.15 | 2 |"
    assert told[4] == "| step | 2 |  |  |"
    assert told[-1].startswith("Measured on ")
    assert "step" not in table.compact()


def test_every_program_that_a_set_runs_is_there():
    programs = {command[0] for name in program.SETS for command in program.commands(name, [1, 2], 7)}
    assert programs == set(table.PROGRAMS)
    for name in programs:
        assert importlib.util.find_spec(f"benchmarks.{name}") is not None


def test_ratios_and_medians_by_hand():
    assert ratio([2.0, 2.0, 6.0], [1.0, 2.0, 2.0]) == {"ratio": 1.0, "low": 1.0, "high": 3.0}
    assert middle([3.0, 1.0, 2.0]) == {"ratio": 2.0, "low": 1.0, "high": 3.0}


def test_rows_of_adaround_are_those_of_its_runs():
    from benchmarks.adaround import rows_of_digits

    key = {"network": "ResNet", "granularity": "per_tensor", "seed": 0}
    runs = [key | {"method": m, "processor_s": s} for m, s in (("auto", 1.0), ("gram", 5.0), ("sgd", 50.0))]
    rows = rows_of_digits({"digits": runs})
    assert list(rows) == ["digits_resnet"]
    told = {row: values["ratio"] for row, values in rows["digits_resnet"].items()}
    assert told == {"AdaRound auto / sgd, time": 0.02, "AdaRound gram / sgd, time": 0.1}


def test_the_table_names_no_path_of_a_machine():
    for page in table.PAGES:
        assert not re.search(r"/(work|tmp|home|root)/", table.placed(page)[1])
