"""What AutoQuant and mixed precision reach on the digits networks, and at what cost in forwards.

    python -m benchmarks.auto_quant reach [mixed | auto]                   # what they reach: a few minutes on one core
    python -m benchmarks.auto_quant total [NAME ...] [--threads 1] [--keep]  # seconds and memory of AutoQuant

AutoQuant starts from the MobileNet whose channels were rescaled by three orders of magnitude (the same float function)
and stands beside every single technique. Mixed precision stands beside one width for all layers, at the same size; its
work is counted in images that pass the network (a backward as two), against one evaluation a layer and width.

Total: every stage tried (no target to stop at), W8A8; the digits with 256 images to calibrate and accuracy on 597, the
other networks with 8 samples, scored by their SQNR. Seconds of the processor for one thread, else of the wall.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import qlab
from benchmarks.measuring import RESET, Row, exactly, peak_bytes, seconds
from benchmarks.models import DIGITS, NAMES, load
from benchmarks.record import Record
from qlab.techniques import TECHNIQUES

SINGLE = ("BatchNormFolding", "CrossLayerEqualization", "AdaRound", "GPTQ", "SequentialMSE", "BiasCorrection")


def auto() -> None:
    """AutoQuant against each technique alone, W8A8 and W4A8 per tensor."""
    digits = qlab.examples.digits()
    calibration, score, noise = digits.calibration(8), qlab.Accuracy(digits.test), qlab.SQNR(digits.test)
    model = qlab.examples.rescale(qlab.examples.mobilenet(), (0.03, 30.0))
    for preset in (qlab.presets.w8a8(), qlab.presets.w4a8()):
        sim = qlab.QuantSim(model, calibration[0], preset)
        sim.calibrate(calibration)
        print(f"\nrescaled MobileNet, {preset.name} per tensor")
        print(f"  float                   {sim.evaluate(score, quantized=False)}")
        print(f"  as given                {sim.evaluate(score)}, {sim.evaluate(noise)}")
        for name in (name for name in SINGLE if name in TECHNIQUES):
            alone = copy.deepcopy(sim)
            report = TECHNIQUES[name]().apply(alone, calibration, score=score)
            print(f"  {name:23} {alone.evaluate(score)}, {alone.evaluate(noise)}, {report.seconds:.1f} s")
        for how, settings in (
            ("to its target", {}),
            ("all stages", {"stop_at_target": False}),
            ("within error", {"stop_at_target": False, "within_error": True}),
        ):
            result = qlab.AutoQuant(allowed_drop=0.005, **settings).apply(sim, calibration, score=score)
            told = f"{result.sim.evaluate(score)}, {result.best.sqnr:.1f} dB, {result.seconds:.1f} s"
            print(f"  AutoQuant {how:14}{told}")
            print("\n".join(f"    {line}" for line in (result.summary, *result.notes)))


def mixed() -> None:
    """Mixed precision against one width for all, at the size of 6 bits."""
    digits = qlab.examples.digits()
    calibration, noise, score = digits.calibration(8), qlab.SQNR(digits.test), qlab.Accuracy(digits.test)
    for name, build in (("MobileNet", qlab.examples.mobilenet), ("ResNet", qlab.examples.resnet)):
        sim = qlab.QuantSim(build(), calibration[0])
        qlab.BatchNormFolding().apply(sim)
        sim.calibrate(calibration)
        uniform = copy.deepcopy(sim)
        uniform.configure("*", weight={"bits": 6})
        print(
            f"\n{name}, per tensor, at the size of 6 bits: uniform {uniform.evaluate(noise)}, {uniform.evaluate(score)}"
        )
        layers = sum(layer.weight is not None for layer in sim.layers.values())
        for bits in ((4, 8, 16), (4, 6, 8, 16), qlab.MixedPrecision().bits):
            twin = copy.deepcopy(sim)
            with counted() as images:
                report = qlab.MixedPrecision(bits=bits, budget=6.0, verify=0).apply(twin, calibration, score=noise)
            one_by_one = layers * len(bits) * len(digits.test_images)
            print(
                f"  {bits!s:16} {twin.evaluate(noise)}, {twin.evaluate(score)}, predicted "
                f"{report.values['predicted']:.1f} dB; {sum(images)} images, one by one {one_by_one}: "
                f"{sum(images) / one_by_one:.2f}; {report.seconds:.1f} s"
            )


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collects how many images pass the last, linear layer; those of a backward count twice."""
    images: list[int] = []
    linear, grad = torch.nn.functional.linear, torch.autograd.grad

    def counting_linear(x, *args, **kwargs):
        images.append(len(x))
        return linear(x, *args, **kwargs)

    def counting_grad(outputs, *args, **kwargs):
        images.append(2 * len(outputs[0]))
        return grad(outputs, *args, **kwargs)

    torch.nn.functional.linear, torch.autograd.grad = counting_linear, counting_grad
    try:
        yield images
    finally:
        torch.nn.functional.linear, torch.autograd.grad = linear, grad


def total(name: str) -> dict[str, Row]:
    """What AutoQuant costs from a calibrated sim to its result."""
    model, x = load(name)
    digits = qlab.examples.digits()
    batches = digits.calibration(8) if name in DIGITS else list(torch.randn(8, *x.shape[1:]).split(2))
    score = qlab.Accuracy(digits.test) if name in DIGITS else qlab.SQNR(batches)
    sim = qlab.QuantSim(model, batches[0])
    sim.calibrate(batches)
    auto, spent = qlab.AutoQuant(stop_at_target=False), []

    def work() -> None:
        spent.append(seconds(lambda: auto.apply(sim, batches, score=score)))

    rows = {"peak memory, AutoQuant, MiB": exactly(peak_bytes(work) / 2**20)} if RESET.exists() else {}
    if not spent:
        work()
    return {"AutoQuant total, s": exactly(spent[0]), **rows}


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("reach", "total"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.part == "reach":
        for part in asked.names or ("mixed", "auto"):
            {"mixed": mixed, "auto": auto}[part]()
        return
    record = Record("auto_quant", asked.keep, asked.again)
    for name in asked.names or NAMES:
        torch.manual_seed(0)
        if record.lacks(name, asked.threads, "AutoQuant"):
            record.add(name, asked.threads, "AutoQuant", total(name))


if __name__ == "__main__":
    main()
