"""The main job in a terminal, with a text report: `python -m qlab.examples [--out FOLDER]`, under a minute.

A network that reads digits was rescaled, so that W8A8 takes it to chance. The report finds the layer to blame, repairs
the network without training, takes the weights to 4 bits, and writes what a target reads if a folder is given.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import qlab
from qlab import examples
from qlab.analysis.layer_noise import layer_noise

WORST = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job and prints its report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qlab.examples", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the ONNX file and the encodings")
    folder = parser.parse_args(arguments).out
    started_s = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a small network is fastest so

    digits = examples.digits()
    model = examples.rescale(examples.mobilenet(), spread=(1 / 30, 30), seed=0)
    batches, score = digits.calibration(), qlab.Accuracy(digits.test)
    _say(f"data       {digits}")
    _say("model      MobileNetV2 in small, its channels rescaled: the same function, hard to quantize")

    sim = qlab.QuantSim(model, digits.test[0], qlab.presets.w8a8())
    sim.calibrate(batches)
    noise_of_result = qlab.SQNR(digits.test)
    _say(f"\nfloat      {sim.evaluate(score, quantized=False)}")
    _say(f"W8A8       {sim.evaluate(score)}, SQNR {float(sim.evaluate(noise_of_result)):.1f} dB")

    noise = layer_noise(sim, digits.calibration(2)).nsmallest(WORST, "own_sqnr")
    _say(f"\nThe {WORST} layers that add most noise of their own, SQNR in dB:")
    for row in noise.itertuples():
        _say(f"  {row.own_sqnr:6.1f}  {row.layer}")

    _say("\nRepairs, none of which trains:")
    steps = (
        ("equalize", qlab.CrossLayerEqualization()),
        ("W4", None),
        ("AdaRound", qlab.AdaRound()),
    )
    for name, technique in steps:
        if technique is None:
            sim.configure("*", weight={"bits": 4})
            told = "weights at 4 bits, activations at 8"
        else:
            told = technique.apply(sim, batches).summary
        scores = f"{sim.evaluate(score)}, SQNR {float(sim.evaluate(noise_of_result)):.1f} dB"
        _say(f"  {name:9}{told}\n           {scores}")

    if folder is not None:
        _say("\nWritten:")
        for path, size_bytes in sim.export(folder / "digits").files.items():
            _say(f"  {path}, {size_bytes / 1024:,.0f} KiB")
    _say(f"\n{time.monotonic() - started_s:.0f} s. Next: qlab lab, which opens the tutorials.")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
