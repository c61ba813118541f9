"""The sweep of an analysis: what it computes, and what it does not compute twice."""

from qlab.analysis.bits import Bits
from qlab.analysis.cases import cases_of
from qlab.analysis.sweep import Sweep
from qlab.analysis.units import units_of
from tests.analysis.small import calibrated, data


def test_few_quantizers_are_switched_between_two_cases():
    sim = calibrated()
    cases = cases_of(units_of(sim), [Bits(4, 4)], ("enabled", "disabled"))
    sweep = Sweep(sim, cases)
    before = {key: quantizer.version for key, quantizer in sweep.sim.quantizers.items()}
    found = [case for case, _ in sweep.outputs(list(data())[:1])]
    assert sorted(map(str, found)) == sorted(map(str, cases))
    # on and off once in each sweep, and with all others for the six changes between float, the summary and the sweeps
    switched = {key: quantizer.version - before[key] for key, quantizer in sweep.sim.quantizers.items()}
    assert max(switched.values()) <= 2 + 2 + 6
    assert len(cases) > 2 * 6  # so that switching all for each case would be told from this
