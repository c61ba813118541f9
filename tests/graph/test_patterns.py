"""Kernels scale and answer as the layers they stand for; links lead where a factor a channel may go."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.graph import capture
from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.patterns import links, runs, upper_bound


class Functions(nn.Module):
    """Weights written as functions: linear, addmm, a product, a convolution and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
        self.c, self.d = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))
        self.e = nn.Parameter(torch.randn(7, 8))
        self.f, self.g = nn.Parameter(torch.randn(4, 1, 3)), nn.Parameter(torch.randn(4))
        self.h = nn.Parameter(torch.randn(4, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.d, F.linear(x, self.a, self.b), self.c) @ self.e
        x = F.conv1d(x.view(-1, 2, 4), self.f, self.g, 1, 1, 1, 2)
        return F.conv_transpose1d(x, self.h, None, 2, 0, 0, 2)


LAYERS = {
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise with a multiplier": (nn.Conv1d(3, 6, 2, groups=3, bias=False), (3, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 3, 3)),
    "transposed, depthwise": (nn.ConvTranspose1d(3, 6, 3, groups=3, bias=False), (3, 4)),
    "volumes": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "linear over time": (nn.Linear(5, 4), (3, 5)),
    "functions": (Functions(), (5,)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_factors_and_responses_are_those_of_the_layer_itself(name):
    model, shape = LAYERS[name]
    graph = capture(nn.Sequential(model).double(), torch.randn(2, *shape).double())
    kernels = [kernel for layer in graph if (kernel := kernel_of(layer)) is not None]
    assert len(kernels) == (5 if name == "functions" else 1)
    for kernel in kernels:
        outputs, inputs = 1 + torch.rand(kernel.outputs).double(), 1 + torch.rand(kernel.inputs).double()
        axis = kernel.channel_axis
        source = [2, *kernel.source.shape[1:]]
        x = torch.randn(source, dtype=torch.float64)
        bias = kernel.bias.clone() if kernel.bias is not None else None

        def computed(value: Tensor, kernel: Kernel = kernel) -> Tensor:
            return _alone(graph, kernel, value)

        if bias is not None:
            kernel.shift_bias(-bias)
        want = computed(x * _on(inputs, axis, x.dim())) * _on(outputs, axis, x.dim())
        weight = kernel.weight.clone()
        kernel.weight.mul_(kernel.factors(outputs, inputs))
        assert torch.allclose(computed(x), want)
        kernel.weight.copy_(weight)
        if not kernel.form.windows or not kernel.form.windows.transposed:
            constant = torch.randn(kernel.inputs).double()
            answer = computed(_on(constant, axis, x.dim()).expand(source).clone())
            middle = answer.movedim(axis, -1)[(slice(None), *[1] * (answer.dim() - 2))]
            assert torch.allclose(middle, kernel.response(constant).expand_as(middle))


def _alone(graph, kernel: Kernel, value: Tensor) -> Tensor:
    """The layer's result on `value`, its parameters read from the model."""
    layer = kernel.layer
    if layer.module is not None:
        return layer.module(value)
    args = [
        value if a is kernel.source else getattr(a.owner, a.attribute) if hasattr(a, "owner") else a for a in layer.args
    ]
    return layer.function(*args)


def _on(values: Tensor, axis: int, rank: int) -> Tensor:
    return values.view([-1 if i == axis else 1 for i in range(rank)])


class Routes(nn.Module):
    """Linear layers one after another with, between them, what keeps or loses the channels' order."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(7):
            setattr(self, f"fc{i}", nn.Linear(6, 6))
        self.conv, self.out = nn.Conv1d(6, 6, 1), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 6]
        x = self.fc1(F.relu(self.fc0(x)))
        x = self.fc2(F.relu(x).reshape(-1, 2, 2, 6).reshape(-1, 4, 6))  # positions move, channels stay
        x = self.fc3(F.relu(x).reshape(-1, 6, 4).transpose(1, 2))  # channels are torn apart
        x = F.relu(self.fc4(x)).permute(0, 2, 1)
        x = F.relu(self.conv(x)).transpose(2, 1)  # there and back
        x = self.fc6(F.relu(self.fc5(x)).clamp(min=0))
        return self.out(F.leaky_relu(x).transpose(1, 2).flatten(1))  # a channel owns four columns


def test_links_follow_channels_through_transposes_and_reshapes():
    graph = capture(Routes(), torch.randn(2, 4, 6))
    found, reasons = links(graph)
    assert [(link.first.name, link.second.name, link.repeat) for link in found] == [
        ("fc0", "fc1", 1),
        ("fc1", "fc2", 1),
        ("fc3", "fc4", 1),
        ("fc4", "conv", 1),
        ("conv", "fc5", 1),
        ("fc5", "fc6", 1),
        ("fc6", "out", 4),
    ]
    assert reasons["fc2"].endswith("follows")
    assert [len(run) for run in runs(found)] == [1] * 7


def test_a_run_goes_on_through_depthwise_layers_only():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    found, _ = links(capture(model, torch.randn(2, 3, 9, 9)))
    assert [[(link.first.name, link.second.name) for link in run] for run in runs(found)] == [
        [("0", "1"), ("1", "2"), ("2", "3")],
        [("3", "4")],
    ]


def test_the_upper_bound_of_what_clips_at_zero():
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu6, self.hard = nn.ReLU6(), nn.Hardtanh(0, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.hard(self.relu6(x))
            x = F.relu6(F.hardtanh(F.hardtanh(x, 0, 2)))
            return x.clamp(0).clamp(0, 5).clamp(max=4).clamp_min(0).clamp(-1, 1)

    graph = capture(Clips(), torch.randn(2, 3))
    bounds = [upper_bound(layer) for layer in graph if layer.kind in ("clip", "relu6")]
    inf = float("inf")
    assert bounds == [6.0, 3.0, 2.0, None, 6.0, inf, 5.0, None, inf, None]
