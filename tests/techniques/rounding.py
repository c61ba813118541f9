"""What tests of rounding techniques share: data with something to gain, a small sim, and questions to its weights."""

import torch
from torch import Tensor, nn

import qlab


def correlated(n: int, *size: int, seed: int = 0) -> Tensor:
    """Inputs whose neighbours resemble each other, as in images: rounding errors can cancel."""
    x = torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))
    for axis in range(1, x.dim()):
        x = x + 0.7 * x.roll(1, axis)
    return x


def weights(sim: qlab.QuantSim) -> dict[str, qlab.quantization.WeightQuantizer]:
    return {name: layer.weight for name, layer in sim.layers.items() if layer.weight is not None}


def codes(sim: qlab.QuantSim) -> dict[str, Tensor | None]:
    return {name: weight.rounding for name, weight in weights(sim).items()}


def equal(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(x is not None and torch.equal(x, b[name]) for name, x in a.items())


def on_grid(weight: qlab.quantization.WeightQuantizer) -> bool:
    """Whether the weight in force is integers of the grid times the scale, exactly."""
    encoding = weight.required_encoding()
    scale, zero = encoding.broadcast(weight.weight.shape)
    integers = (weight.quantized().detach().double() / scale.double() + zero.double()).float()
    whole = (integers - integers.round()).abs().max() < 1e-2  # 16 bits fill what float32 can tell apart
    return bool(whole) and int(integers.round().min()) >= encoding.qmin and int(integers.round().max()) <= encoding.qmax


def two_layers(preset: qlab.Preset | None = None, bias: float = 0.0) -> tuple[qlab.QuantSim, list[Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    model[0].bias.data[0] += bias
    batches = [correlated(64, 12, seed=seed) for seed in range(2)]
    sim = qlab.QuantSim(model, batches[0], preset or qlab.presets.w4a8())
    sim.calibrate(batches)
    return sim, batches
