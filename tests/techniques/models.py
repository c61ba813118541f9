"""Small networks with BatchNorms that have seen life, and what tests of several techniques ask of a sim."""

import torch
from torch import Tensor, nn

import qlab


def lived(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode, its BatchNorms with statistics and parameters as after training; some gammas negative."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                    module.running_var.copy_(uniform(module.running_var, 0.2, 3))
                if module.weight is not None:
                    sign = torch.where(uniform(module.weight, 0, 1) < 0.2, -1.0, 1.0)
                    module.weight.copy_(uniform(module.weight, 0.3, 2) * sign)
                    module.bias.copy_(uniform(module.bias, -1, 1))
            if isinstance(module, nn.PReLU):
                module.weight.copy_(uniform(module.weight, 0.05, 0.5))
    return model.eval()


def relative(have: Tensor, want: Tensor) -> float:
    """|have - want| / |want| in norm."""
    have, want = have.detach().double(), want.detach().double()
    return float((have - want).norm() / want.norm())


def calibrated(model: nn.Module, x: Tensor, preset: qlab.Preset | None = None) -> qlab.QuantSim:
    sim = qlab.QuantSim(model, x, preset)
    sim.calibrate([x])
    return sim


def images() -> nn.Module:
    """Every kind of 2-d layer that takes a BatchNorm, and every activation that a factor passes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 12, 1, groups=4, bias=False),
        nn.BatchNorm2d(12),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


def sequences() -> nn.Module:
    """The same in one dimension, with a depthwise transposed convolution and a BatchNorm without parameters."""
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding="same"),
        nn.BatchNorm1d(6, affine=False),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 12, 3, stride=2, groups=6),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, 5, 2, dilation=2, bias=False),
        nn.BatchNorm1d(5),
    )


def volumes() -> nn.Module:
    """The same in three dimensions."""
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.ConvTranspose3d(4, 4, 2, groups=2),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


NETWORKS = {
    "images": (images, (3, 8, 8)),
    "sequences": (sequences, (4, 12)),
    "volumes": (volumes, (2, 4, 4, 4)),
}
