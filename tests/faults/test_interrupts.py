"""Ctrl-C at random moments: every technique, and calibration, leaves the sim as it was, and the next run is right."""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlab
from qlab.errors import Cancelled
from tests.faults.faults import Lines, ctrl_c_after
from tests.techniques.test_transactions import OWN, Stopping, differing, labelled, original, score, state, technique

__all__ = ["original"]

MOMENTS = 4
Work = Callable[[qlab.QuantSim, Any], object]

WORKS: dict[str, Work] = {
    name: lambda sim, progress, name=name: technique(name).apply(sim, labelled(), score=score(), progress=progress)
    for name in OWN
}

WORKS["calibrate"] = lambda sim, progress: sim.calibrate([x for x, _ in labelled()], progress=progress)
WORKS["QuantAnalyzer"] = lambda sim, progress: qlab.QuantAnalyzer(probe_batches=1).measure(
    sim, [x for x, _ in labelled()], score(), progress=progress
)


def prepared(name: str, original: qlab.QuantSim) -> qlab.QuantSim:
    sim = copy.deepcopy(original)
    if name == "calibrate":
        sim.configure("*", output={"rule": "sqnr"})
    return sim


@pytest.mark.parametrize("name", WORKS)
def test_ctrl_c_at_random_moments_changes_nothing_and_the_next_run_is_right(original, name):
    work, chance = WORKS[name], random.Random(name)
    whole, counting, lines = prepared(name, original), Stopping(), Lines()
    before = state(whole)
    work(whole, counting)
    want = state(whole)
    sim = prepared(name, original)
    with lines:
        work(sim, None)
    sim, began = prepared(name, original), time.process_time()
    work(sim, None)
    seconds = time.process_time() - began

    def interrupted(moment: float, how: int) -> None:
        """Runs the work on `sim`; how: at a step of its progress, before some line, or after some time."""
        if how == 0:
            work(sim, Stopping(int(moment * counting.steps), KeyboardInterrupt()))
        elif how == 1:
            with Lines(stop_at=1 + int(moment * lines.count)):
                work(sim, None)
        else:
            with ctrl_c_after(max(moment * seconds, 1e-6)):
                work(sim, None)

    sim, stopped = prepared(name, original), 0
    for turn in range(3 * MOMENTS):
        how, moment = turn % 3, chance.random()
        try:
            interrupted(moment, how)
        except KeyboardInterrupt:
            stopped += 1
            assert torch.is_grad_enabled()
            left = differing(state(sim), before)
            if left and how > 0:  # met when all was done, on the way back
                left = differing(state(sim), want)
                sim = prepared(name, original)
            assert left == [], f"turn {turn}, moment {moment}"
        else:  # it was faster than the interrupt
            assert how > 0
            assert differing(state(sim), want) == [], f"turn {turn}, moment {moment}"
            sim = prepared(name, original)
    assert stopped >= 2 * MOMENTS
    work(sim, None)
    assert differing(state(sim), want) == []


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.97])
def test_an_interrupted_calibration_gives_every_module_its_mode_back(original, share):
    sim, data = copy.deepcopy(original), [x for x, _ in labelled()]
    sim.model[1].train()
    sim.calibrate(data)
    with Lines() as lines:
        sim.calibrate(data)
    with pytest.raises(KeyboardInterrupt), Lines(stop_at=int(share * lines.count)):
        sim.calibrate(data)
    assert [name for name, module in sim.model.named_modules() if module.training] == ["1"]


def test_auto_quant_interrupted_at_random_moments_gives_a_state_that_it_scored(original):
    chance, before = random.Random(0), state(original)
    auto = qlab.AutoQuant(techniques=("CrossLayerEqualization",), stop_at_target=False)
    counting = Stopping()
    auto.apply(original, [x for x, _ in labelled()], score=score(), progress=counting)
    for _ in range(MOMENTS):
        progress = Stopping(chance.randrange(counting.steps // 4, counting.steps), Cancelled("enough"))
        result = auto.apply(original, [x for x, _ in labelled()], score=score(), progress=progress)
        assert result.cancelled
        # folded, its float results are those of the original up to rounding
        assert float(result.sim.evaluate(score())) == pytest.approx(result.best.score, rel=1e-5)
        assert differing(state(original), before) == []


def test_ctrl_c_at_random_moments_of_auto_quant_leaves_the_sim_and_the_next_run_is_right(original):
    chance, before, data = random.Random(1), state(original), [x for x, _ in labelled()]
    auto = qlab.AutoQuant(techniques=("CrossLayerEqualization",), stop_at_target=False)

    def stages(result: Any) -> list[tuple[str, str, float]]:
        return [(record.stage, record.verdict, record.score) for record in result.records]

    want = stages(auto.apply(original, data, score=score()))
    with Lines() as lines:
        auto.apply(original, data, score=score())
    for turn in range(2 * MOMENTS):
        moment = chance.random()
        try:
            with Lines(stop_at=1 + int(moment * lines.count)):
                assert auto.apply(original, data, score=score()).cancelled, f"turn {turn}, moment {moment}"
        except KeyboardInterrupt:
            pass
        assert differing(state(original), before) == [], f"turn {turn}, moment {moment}"
        assert torch.is_grad_enabled()
    assert stages(auto.apply(original, data, score=score())) == want
