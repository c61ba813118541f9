"""The analyzer's numbers are those of full runs, its errors those of independent formulas, and the sim is untouched."""

import math

import numpy as np
import pytest
import torch

import qlab
from qlab.analysis import Bits, Row, units_of
from qlab.errors import Cancelled, InputError, NotCalibrated, SpecError, UnknownLayer
from qlab.progress import Cancellable
from qlab.settings import SettingError, describe
from tests.analysis.small import branches, calibrated, data

QUICK = {"estimate": False, "probe_batches": 1}


def fingerprint(sim):
    """Everything that a person can see of a sim, and what it computes."""
    states = {name: q.state() for name, q in sim.quantizers.items()}
    seen = {
        name: (s.spec, s.enabled, s.frozen, None if s.encoding is None else (s.encoding.scale, s.encoding.zero_point))
        for name, s in states.items()
    }
    modes = [module.training for module in sim.modules()]
    with sim.evaluating():
        output = sim.output(data()[0]).tolist()
    return repr(seen), modes, sim.quantization_enabled, repr(sim.state_dict()), output


def brute_force(sim, score, mode, unit, bits):
    """The score of a full run with this unit switched by hand on the sim itself."""
    for key, quantizer in sim.quantizers.items():
        width = (bits.weight if key.endswith(":weight") else bits.output) or quantizer.bits
        quantizer.bits = width
        quantizer.enabled = (key in unit.quantizers) == (mode == "enabled")
    return sim.evaluate(score)


@pytest.mark.parametrize("kind", [qlab.Accuracy, qlab.Agreement, qlab.SQNR])
@pytest.mark.parametrize("by", ["layer", "quantizer"])
def test_every_score_equals_that_of_a_full_run(kind, by):
    sim, score = calibrated(), kind(data(seed=5))
    analysis = qlab.QuantAnalyzer(by=by, **QUICK).measure(sim, data(), score, bits=[None, 3, (4, 8)])
    units = {(unit.layer, unit.part): unit for unit in units_of(sim, by)}
    for bits in analysis.bits:
        twin = calibrated()
        for mode in ("enabled", "disabled"):
            rows = analysis.table(mode)
            rows = rows[rows.bits == bits]
            assert list(zip(rows.layer, rows.part, strict=True)) == list(units)
            for row in rows.itertuples():
                full = brute_force(twin, score, mode, units[row.layer, row.part], Bits.of(bits))
                assert row.score == float(full)
                assert row.error == pytest.approx(full.standard_error, nan_ok=True)


def test_the_summary_separates_weights_from_activations():
    sim, score = calibrated(), qlab.SQNR(data())
    analysis = qlab.QuantAnalyzer(**QUICK).measure(sim, data(), score)
    twin = calibrated()
    for quantizer in twin.quantizers.values():
        quantizer.enabled = not isinstance(quantizer, qlab.quantization.WeightQuantizer)
    assert analysis.activations_only.score.tolist() == [float(twin.evaluate(score))]
    for quantizer in twin.quantizers.values():
        quantizer.enabled = not quantizer.enabled
    assert analysis.weights_only.score.tolist() == [float(twin.evaluate(score))]
    assert analysis.summary["mode"].tolist() == ["float", "both", "weights only", "activations only"]


@pytest.mark.parametrize("preset", [qlab.presets.w4a4(per_channel=True), qlab.presets.w8a8(int32_bias=True)])
def test_int32_biases_and_clipping_rules_are_switched_as_in_full_runs(preset):
    score = qlab.SQNR(data(seed=5))
    analysis = qlab.QuantAnalyzer(**QUICK).measure(calibrated(preset), data(), score)
    twin = calibrated(preset)
    units = {unit.layer: unit for unit in units_of(twin)}
    for mode in ("enabled", "disabled"):
        for row in analysis.table(mode).itertuples():
            assert row.score == float(brute_force(twin, score, mode, units[row.layer], Bits()))


def test_the_sim_is_left_as_it_was_and_may_even_train():
    sim = calibrated()
    sim["stem.0"].weight.freeze()
    sim["head"].output.enabled = False
    sim.train()
    sim.model.stem[1].eval()
    before = fingerprint(sim)
    qlab.QuantAnalyzer().measure(sim, data(), qlab.Accuracy(data()), bits=(None, 3))
    assert fingerprint(sim) == before


@pytest.mark.parametrize("step", [0, 1, 2, 9, 30])
def test_cancelling_or_failing_anywhere_leaves_the_sim_as_it_was(step):
    sim = calibrated()
    before = fingerprint(sim)
    cancellable, steps = Cancellable(), []

    class Stop:
        def step(self, done, total, text=""):
            steps.append((done, total))
            if len(steps) > step:
                cancellable.cancel()
            cancellable.step(done, total, text)

    with pytest.raises(Cancelled):
        qlab.QuantAnalyzer().measure(sim, data(), qlab.Accuracy(data()), progress=Stop())
    assert len(steps) == step + 1
    assert fingerprint(sim) == before

    def breaks(row):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        qlab.QuantAnalyzer(**QUICK).measure(sim, data(), on_row=breaks)
    assert fingerprint(sim) == before


def test_progress_counts_every_step_to_the_end():
    steps = []

    class Count:
        def step(self, done, total, text=""):
            steps.append((done, total, text))

    qlab.QuantAnalyzer().measure(calibrated(), data(), qlab.Accuracy(data()), progress=Count())
    assert [done for done, _, _ in steps] == list(range(len(steps)))
    assert {total for _, total, _ in steps} == {len(steps)}
    assert any("stem.0 enabled" in text for _, _, text in steps)


def test_paired_errors_are_those_of_the_differences_sample_by_sample():
    sim, labelled = calibrated(qlab.presets.w4a4()), data(batches=6, size=20)
    analysis = qlab.QuantAnalyzer(**QUICK).measure(sim, labelled, qlab.Accuracy(labelled), bits=3)
    row = analysis.summary.set_index("mode").loc["both"]
    right = {}
    for enabled in (False, True):
        twin = calibrated(qlab.presets.w4a4())
        for quantizer in twin.quantizers.values():
            quantizer.bits, quantizer.enabled = 3, enabled
        right[enabled] = np.concatenate([(twin.output(x).argmax(1) == y).double().numpy() for x, y in labelled])
    difference = right[True] - right[False]
    assert row.change == pytest.approx(difference.mean(), abs=1e-12)
    assert row.change_error == pytest.approx(difference.std(ddof=1) / math.sqrt(len(difference)), rel=1e-9)
    assert 0 < row.change_error < math.hypot(row.error, analysis.summary.error.iloc[0])


def test_rows_are_told_as_they_become_known_and_grow_surer():
    seen: list[Row] = []
    analysis = qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data(), qlab.Accuracy(data()), on_row=seen.append)
    cases = len(analysis.summary) + len(analysis.enabled) + len(analysis.disabled)
    assert len({row.key for row in seen[:cases]}) == cases  # a first value of every row after one batch
    mine = [row for row in seen if row.key == ("stem.0", "layer", "enabled", "as set")]
    assert [row.samples for row in mine] == [12, 24, 31]
    last = analysis.enabled.set_index("layer").loc["stem.0"]
    assert (mine[-1].score, mine[-1].error) == (last.score, last.error)


def test_rows_can_be_iterated_and_the_analysis_is_returned():
    seen = []

    def drawn():
        rows = qlab.QuantAnalyzer(**QUICK).measure_rows(calibrated(), data())
        for row in rows:
            seen.append(row)
            break
        return (yield from rows)

    *others, analysis = *(generator := _Returning(drawn())), generator.value
    assert len(analysis.enabled) == len(analysis.units)
    assert len({row.key for row in (*seen, *others)}) == len(analysis.summary) + 2 * len(analysis.units)


def test_a_subset_of_layers_gets_rows_with_the_numbers_of_the_whole():
    whole = qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data())
    part = qlab.QuantAnalyzer(layers="left, depthwise.*", **QUICK).measure(calibrated(), data())
    assert part.enabled.layer.tolist() == ["depthwise.0", "left"]
    for mode in ("enabled", "disabled"):
        wanted = whole.table(mode)[whole.table(mode).layer.isin(["depthwise.0", "left"])]
        assert part.table(mode).score.tolist() == wanted.score.tolist()


def test_after_an_edit_one_row_is_measured_anew_and_the_others_stay():
    sim = calibrated()
    analyzer = qlab.QuantAnalyzer(**QUICK)
    before = analyzer.measure(sim, data())
    assert analyzer.update(before, sim, data()) is before
    sim["head"].weight.bits = 2
    assert [unit.layer for unit in before.changed_units(sim)] == ["head"]
    after = analyzer.update(before, sim, data())
    assert after.enabled.layer.tolist() == before.enabled.layer.tolist()
    fresh = analyzer.measure(sim, data())
    assert after.enabled.score.tolist() == fresh.enabled.score.tolist()
    assert after.enabled.score.tolist() != before.enabled.score.tolist()
    assert after.unit_of("head").layer == "head"
    assert after.work.forwards < 0.2 * before.work.forwards
    assert set(after.enabled.note) == {""}
    assert set(after.disabled.note) == {"of an earlier state"}
    assert after.summary.set_index("mode").note.to_dict() == {
        "float": "",
        "both": "of an earlier state",
        "weights only": "of an earlier state",
        "activations only": "of an earlier state",
    }
    assert after.changed_units(sim) == []


def test_a_row_of_which_a_part_is_switched_off_is_one_row_still():
    sim, analyzer = calibrated(), qlab.QuantAnalyzer(**QUICK)
    before = analyzer.measure(sim, data())
    sim["head"].output.enabled = False
    after = analyzer.update(before, sim, data())
    assert after.enabled.layer.tolist() == before.enabled.layer.tolist()
    assert after.enabled.score.tolist() == analyzer.measure(sim, data()).enabled.score.tolist()
    sim["head"].output.enabled = True
    assert analyzer.update(after, sim, data()).enabled.score.tolist() == before.enabled.score.tolist()


def test_when_weights_changed_all_is_measured_again():
    sim, analyzer = calibrated(), qlab.QuantAnalyzer(**QUICK)
    before = analyzer.measure(sim, data())
    with torch.no_grad():
        sim.model.left.weight.mul_(1.01)
    assert len(before.changed_units(sim)) == len(before.units)
    after = analyzer.update(before, sim, data())
    assert after.enabled.score.tolist() == analyzer.measure(sim, data()).enabled.score.tolist()
    assert set(after.disabled.note) == {""}


class _Returning:
    """Iterates a generator and keeps what it returns."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        self.value = yield from self.generator


class Gap(qlab.Evaluation):
    """Minus the largest logit over all batches: needs all outputs at once."""

    name = "gap"

    def __init__(self, batches):
        self.batches = qlab.sim.Batches(batches)

    def of_outputs(self, sim, outputs):
        return qlab.Measurement(-max(float(output.abs().max()) for output in outputs))


def test_scores_of_all_outputs_and_of_models_equal_full_runs():
    def negative_mean(model):
        return -sum(float(model(x).abs().mean()) for x, _ in data())

    for score in (Gap(data()), negative_mean):
        analysis = qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data(), score)
        twin = calibrated()
        units = {unit.layer: unit for unit in units_of(twin)}
        for mode in ("enabled", "disabled"):
            for row in analysis.table(mode).itertuples():
                assert row.score == float(brute_force(twin, score, mode, units[row.layer], Bits()))
                assert math.isfinite(row.sqnr)


def test_a_score_that_fails_for_one_layer_says_so_in_its_row_and_the_rest_goes_on():
    calls = []

    def fragile(model):
        on = [q.name for q in model.quantizers.values() if q.enabled]
        calls.append(on)
        if len(on) <= 2 and "depthwise.0" in on:
            raise ValueError("division of the pie failed")
        if len(on) <= 2 and "head" in on:
            return math.nan
        return float(len(on))

    analysis = qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data(), fragile)
    rows = analysis.enabled.set_index("layer")
    assert rows.note["depthwise.0"] == "the score raised ValueError: division of the pie failed"
    assert rows.note["head"] == "the score is not a number"
    assert rows.score.isna().sum() == 2
    assert analysis.disabled.score.notna().all()
    assert "head" not in analysis.ranking()
    assert any("2 cases have no score" in note for note in analysis.notes)


def test_a_tally_that_fails_on_one_batch_is_told_too():
    class Picky(qlab.Accuracy):
        def tally(self, sim, number, batch, output):
            if len(batch[0]) == 7 and float(output.abs().max()) == self.trap:
                raise ValueError("no")
            return super().tally(sim, number, batch, output)

    score = Picky(data())
    twin = calibrated()
    unit = next(unit for unit in units_of(twin) if unit.layer == "left")
    for key, quantizer in twin.quantizers.items():
        quantizer.enabled = key in unit.quantizers
    score.trap = float(twin.output(data()[-1]).abs().max())
    analysis = qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data(), score)
    notes = analysis.enabled.set_index("layer").note
    assert notes["left"] == "the score raised ValueError: no"
    assert (notes.drop("left") == "").all()


def test_a_score_that_fails_on_the_float_model_is_an_error():
    def broken(model):
        raise KeyError("labels")

    with pytest.raises(InputError, match=r"broken cannot be measured on the float model: .*KeyError"):
        qlab.QuantAnalyzer(**QUICK).measure(calibrated(), data(), broken)


def test_what_is_asked_wrongly_is_said_before_anything_runs():
    raw = qlab.QuantSim(branches(), data()[0][0])
    with pytest.raises(NotCalibrated, match=r"sim.calibrate\(batches\)"):
        qlab.QuantAnalyzer().measure(raw, data())
    sim = calibrated()
    with pytest.raises(UnknownLayer, match=r"'haed' matches no layer. Did you mean 'head'"):
        qlab.QuantAnalyzer(layers="haed").measure(sim, data())
    with pytest.raises(InputError, match="at least one batch"):
        qlab.QuantAnalyzer().measure(sim, [])
    with pytest.raises(SpecError, match="'W4A8'"):
        qlab.QuantAnalyzer(bits="four")
    with pytest.raises(SettingError, match="by="):
        qlab.QuantAnalyzer(by="channel")
    sim["head"].weight.enabled = sim["head"].output.enabled = False
    with pytest.raises(InputError, match="switched on"):
        qlab.QuantAnalyzer(layers=["head"]).measure(sim, data())
    for quantizer in sim.quantizers.values():
        quantizer.enabled = False
    with pytest.raises(InputError, match="switched off"):
        qlab.QuantAnalyzer().measure(sim, data())


def test_quantizers_that_are_off_stay_off():
    sim = calibrated()
    sim["left"].weight.enabled = False
    analysis = qlab.QuantAnalyzer(**QUICK).measure(sim, data(), qlab.SQNR(data()))
    both = analysis.summary[analysis.summary["mode"] == "both"].score.iloc[0]
    assert both == float(sim.evaluate(qlab.SQNR(data())))


def test_it_stops_early_when_the_ranking_is_stable_and_says_so():
    sim, many = calibrated(qlab.presets.w4a4()), data(batches=30, size=16)
    whole = qlab.QuantAnalyzer(**QUICK).measure(sim, many, qlab.SQNR(many))
    early = qlab.QuantAnalyzer(stop_when_stable=0.8, **QUICK).measure(sim, many, qlab.SQNR(many))
    assert early.samples < whole.samples
    assert any(note.startswith("stopped after") for note in early.notes)
    assert qlab.analysis.precision.spearman(early.enabled.score.to_numpy(), whole.enabled.score.to_numpy()) > 0.8
    never = qlab.QuantAnalyzer(stop_when_stable=1.0, **QUICK).measure(sim, many[:3], qlab.SQNR(many[:3]))
    assert never.samples == 48


def test_on_resnet18_the_sweeps_need_little_more_than_half_of_the_forwards():
    from benchmarks.models import resnet18, warmed_up

    x = torch.randn(2, 3, 32, 32)
    model = warmed_up(resnet18(), (4, 3, 32, 32), passes=1)
    sim = qlab.QuantSim(model, x)
    sim.calibrate([x])
    analysis = qlab.QuantAnalyzer(**QUICK).measure(sim, [x], qlab.SQNR([x]), by="layer")
    runs = len(analysis.enabled) + len(analysis.disabled)
    summary = 2  # full runs of weights only and activations only; float and both serve the sweeps
    assert (analysis.work.forwards - summary) / runs <= 0.55
    assert (analysis.work.layer_calls - summary * len(sim.graph)) / (runs * len(sim.graph)) <= 0.55
    assert analysis.brute_force.forwards == runs + 4
    unit = next(unit for unit in analysis.units if unit.layer == "layer2.0.conv2")
    twin = qlab.QuantSim(model, x)
    twin.calibrate([x])
    for mode in ("enabled", "disabled"):
        full = brute_force(twin, qlab.SQNR([x]), mode, unit, Bits())
        assert analysis.table(mode).set_index("layer").score[unit.layer] == float(full)


def test_the_settings_make_a_form():
    kinds = {declared.name: declared.kind for declared in describe(qlab.QuantAnalyzer)}
    assert kinds["bits"] == kinds["layers"] == "text"
    assert kinds["by"] == "choice"
    assert kinds["stop_when_stable"] == "float"
    assert describe(qlab.QuantAnalyzer)[0].optional
