"""What QuantAnalyzer costs beside brute force in the same run, and how far its one-pass estimate can be trusted.

    python -m benchmarks.analyzer [NAME ...] [--threads 1] [--keep]

Names: digits_mobilenet, digits_resnet (597 test images), resnet18 (6 images of noise at 224 px), and the larger ones of
benchmarks/models.py (2 samples, at most 48 of their layers, no estimate). Brute force scores every case
(one layer alone at 4 bits, all but one, and the four baselines) by a full run of a sim whose quantizers are switched by
hand. Forwards are counted three ways: calls of layers, the analyzer's own account of the work, and the
multiplications and additions that torch sees (convolutions and products of matrices). The times are those of all of
`measure`, noise of layers and ranges included; time of the processor is the surer one where other programs run too.

The estimate's rank correlation with the exact values (only this layer quantized) is given on the images that the scores
are made on, and on others. The last rows say how far the exact values of these two sets of images agree: on other
images no estimate can be expected to rank layers better than that.
"""

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from glob import escape
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qlab
from benchmarks import models
from benchmarks.measuring import Row, exactly
from benchmarks.models import DIGITS, LARGE, NAMES
from benchmarks.record import Record
from qlab.analysis import Analysis, Unit, estimate_sensitivity, units_of
from qlab.analysis.precision import spearman

BITS = 4
SOME = 48  # layers of the larger networks, at most


def batches_of(name: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A model in eval mode, batches to calibrate and estimate on, and batches to score on."""
    if name in DIGITS:
        digits = qlab.examples.digits()
        model = getattr(qlab.examples, DIGITS[name])().eval()
        return model, digits.calibration(4), [x for x, _ in digits.test]
    model, x = models.load(name)
    scored = 1 if name in LARGE else 3
    return model, [torch.randn(2, *x.shape[1:])], [torch.randn(2, *x.shape[1:]) for _ in range(scored)]


def counted(work: Callable[[], Any]) -> tuple[float, Any]:
    """(operations of convolutions and matrix products, result) of one call."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return float(counter.get_total_flops()), result


def clocks() -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    return time.perf_counter(), time.process_time()


def chosen(sim: qlab.QuantSim, name: str) -> list[Unit]:
    """The layers to analyse: all, or some at equal distances."""
    units = units_of(sim)
    return units[:: max(len(units) // SOME, 1)][:SOME] if name in LARGE else units


def brute_force(sim: qlab.QuantSim, batches: list[Tensor], units: list[Unit]) -> dict[tuple[str, str], float]:
    """The SQNR of every case by a full run: (mode, layer) to dB."""
    twin = copy.deepcopy(sim)
    for quantizer in twin.quantizers.values():
        quantizer.bits = BITS
    cases: dict[tuple[str, str], Callable[[str], bool]] = {
        ("float", ""): lambda key: False,
        ("both", ""): lambda key: True,
        ("weights only", ""): lambda key: key.endswith(":weight"),
        ("activations only", ""): lambda key: not key.endswith(":weight"),
    }
    for unit in units:
        own = set(unit.quantizers)
        cases["enabled", unit.layer] = lambda key, own=own: key in own
        cases["disabled", unit.layer] = lambda key, own=own: key not in own
    found, reference = {}, None
    with torch.no_grad():
        for case, is_on in cases.items():
            for key, quantizer in twin.quantizers.items():
                quantizer.enabled = is_on(key)
            outputs = torch.cat([twin(x) for x in batches]).double()
            reference = outputs if reference is None else reference
            noise = float((outputs - reference).square().sum())
            found[case] = 10 * math.log10(float(reference.square().sum()) / noise) if noise else math.inf
    return found


def largest_difference(analysis: Analysis, brute: dict[tuple[str, str], float]) -> float:
    """Between the scores of the two, in dB."""
    found = {
        (row.mode, row.layer): row.score
        for table in (analysis.summary, analysis.enabled, analysis.disabled)
        for row in table.itertuples()
    }
    assert found.keys() == brute.keys()
    return max(0.0 if found[case] == value else abs(found[case] - value) for case, value in brute.items())


def correlations(analysis: Analysis, estimate: pd.DataFrame) -> dict[str, float]:
    """Spearman's correlation of an estimate with the exact values of `analysis`, of the SQNR and of the KL."""
    table = dataclasses.replace(analysis, estimate=estimate).correlation.set_index(["estimate", "measured"])
    return {name: float(table.spearman[name, name]) for name in ("sqnr", "kl")}


def measure(name: str) -> dict[str, float]:
    """The figures of one model."""
    model, known, batches = batches_of(name)
    sim = qlab.QuantSim(model, known[0])
    sim.calibrate(known)
    units = chosen(sim, name)
    layers = [escape(unit.layer) for unit in units] if name in LARGE else None
    analyzer = qlab.QuantAnalyzer(bits=BITS, estimate=False, probe_batches=1, layers=layers)

    def analyse() -> Analysis:
        return analyzer.measure(sim, batches, qlab.SQNR(batches))

    analyzer.measure(sim, batches[:1], qlab.SQNR(batches[:1]), layers=units_of(sim)[-1].layer)  # everything is loaded
    began = clocks()
    ours, analysis = counted(analyse) if name in LARGE else (0.0, analyse())
    halfway = clocks()
    theirs, brute = (
        counted(lambda: brute_force(sim, batches, units)) if name in LARGE else (0.0, brute_force(sim, batches, units))
    )
    ended = clocks()
    if name not in LARGE:  # counting takes a while for each kernel, which small networks would feel
        ours, theirs = counted(analyse)[0], counted(lambda: brute_force(sim, batches, units))[0]
    noise, _ = counted(lambda: qlab.analysis.layer_noise(sim, batches[:1]))
    rows = len(brute) * len(batches)
    found = {
        "layers": len(analysis.units),
        "full runs of brute force": rows,
        "calls of layers": analysis.work.layer_calls / (rows * len(sim.graph)),
        "forwards, own account": analysis.work.forwards / rows,
        "forwards, operations counted": (ours - noise) / theirs,
        "time": (halfway[0] - began[0]) / (ended[0] - halfway[0]),
        "time of the processor": (halfway[1] - began[1]) / (ended[1] - halfway[1]),
        "seconds of brute force": ended[1] - halfway[1],
        "largest difference, dB": largest_difference(analysis, brute),
    }
    return found if name in LARGE else found | estimated(sim, known, batches, analysis, analyzer)


def estimated(
    sim: qlab.QuantSim,
    known: list[Tensor],
    batches: list[Tensor],
    analysis: Analysis,
    analyzer: qlab.QuantAnalyzer,
) -> dict[str, float]:
    """How well the estimate ranks the layers on the same images and on others, and what it costs."""
    seen = batches[: qlab.QuantAnalyzer().probe_batches]
    started = time.process_time()
    same = correlations(analysis, estimate_sensitivity(sim, seen, bits=(BITS,), probes=2))
    spent = time.process_time() - started
    others = correlations(analysis, estimate_sensitivity(sim, known, bits=(BITS,), probes=2))
    exact = analyzer.measure(sim, known, qlab.SQNR(known), disabled=False, summary=False).enabled
    return {
        "seconds of the estimate": spent,
        "Spearman of the estimate, SQNR": same["sqnr"],
        "Spearman of the estimate, KL": same["kl"],
        "on other images, SQNR": others["sqnr"],
        "on other images, KL": others["kl"],
        "exact there and here, SQNR": spearman(exact.sqnr.to_numpy(), analysis.enabled.sqnr.to_numpy()),
        "exact there and here, KL": spearman(exact.kl.to_numpy(), analysis.enabled.kl.to_numpy()),
    }


def rows_of(found: dict[str, float]) -> dict[str, Row]:
    """What the table shows of the figures."""
    shown = {
        "analyzer / brute force, forwards": found["forwards, operations counted"],
        "analyzer / brute force, time": found["time of the processor" if torch.get_num_threads() == 1 else "time"],
    }
    return {row: exactly(value) for row, value in shown.items()}


def main() -> None:
    """Prints the figures, and keeps them when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--threads", type=int, default=1)
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = Record("analyzer", options.keep, options.again)
    for name in options.names:
        torch.manual_seed(0)
        if not record.lacks(name, options.threads, "analyzer"):
            continue
        found = measure(name)
        print(f"{name}, {BITS} bits (threads: {options.threads}); brute force is 1")
        for row, value in found.items():
            print(f"  {row:35} {value:8.3g}")
        record.found.setdefault("all", {}).setdefault(name, {})[str(options.threads)] = found
        record.add(name, options.threads, "analyzer", rows_of(found))


if __name__ == "__main__":
    main()
