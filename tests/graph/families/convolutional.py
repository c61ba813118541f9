"""Classifiers of images: residual, inverted-residual, dense, branching and shuffling convolutional networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.families.family import Family, images


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is dropped for whole samples in training."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if self.probability == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.probability)
        return x * keep / (1 - self.probability)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut; one ReLU module is called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = conv_bn(inputs, outputs, 1, stride, act=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    """Stem, two stages, global pooling written as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8, 1), ResidualBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; ReLU6 between."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.use_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU6(inplace=True),
            ),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


def mobilenet_v2() -> nn.Module:
    blocks = [InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 3), InvertedResidual(12, 12, 1, 3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10)]
    return nn.Sequential(conv_bn(3, 8, stride=2), *blocks, *head)


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate computed from their means."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(F.relu(self.reduce(s))))


class MobileNetV3(nn.Module):
    """Hardswish as module and as function, squeeze and excite with hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.expand, self.expand_bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.depthwise_bn = nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16)
        self.se = SqueezeExcite(16, nn.Hardsigmoid())
        self.project, self.project_bn = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.expand_bn(self.expand(x)))
        y = self.se(F.hardswish(self.depthwise_bn(self.depthwise(y))))
        x = x + self.project_bn(self.project(y))
        return self.head(F.dropout(x.mean([2, 3]), p=0.2, training=self.training))


class EfficientNetBlock(nn.Module):
    """SiLU, squeeze and excite with sigmoid, stochastic depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, groups=2 * channels),
            nn.BatchNorm2d(2 * channels),
            nn.SiLU(inplace=True),
        )
        self.se = SqueezeExcite(2 * channels, nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels))
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.project(self.se(self.depthwise(self.expand(x)))))


def efficientnet() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(conv_bn(3, 8, stride=2), EfficientNetBlock(8), EfficientNetBlock(8), *head)


class DenseLayer(nn.Module):
    """Norm, ReLU, convolution on everything before; the result is appended."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """A dense block, a transition, a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block1 = nn.ModuleList([DenseLayer(8 + 4 * i, 4) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2))
        self.block2 = nn.ModuleList([DenseLayer(8 + 4 * i, 4) for i in range(2)])
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.block2:
            features.append(layer(features))
        return self.fc(torch.cat(features, 1).mean((-2, -1)))


class Inception(nn.Module):
    """Four branches of different kernels, one with pooling written as a function, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = conv_bn(inputs, 4, 1)
        self.three = nn.Sequential(conv_bn(inputs, 4, 1), conv_bn(4, 6, 3))
        self.factored = nn.Sequential(
            nn.Conv2d(inputs, 4, (1, 7), padding=(0, 3)), nn.ReLU(), nn.Conv2d(4, 4, (7, 1), padding=(3, 0)), nn.ReLU()
        )
        self.pooled = conv_bn(inputs, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.one(x), self.three(x), self.factored(x), pooled], dim=1)


def inception() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(conv_bn(3, 8, stride=2), Inception(8), nn.MaxPool2d(2, ceil_mode=True), Inception(16), *head)


class ShuffleUnit(nn.Module):
    """Half of the channels pass unchanged, then channels are shuffled by reshape and transpose."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, groups=half, act=False), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        x = torch.cat((kept, self.branch(worked)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def shufflenet() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(conv_bn(3, 8, stride=2), ShuffleUnit(8), ShuffleUnit(8), *head)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, channels last, a learned scale a channel, stochastic depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.project = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.5 * torch.ones(channels))
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.project(F.gelu(self.expand(self.norm(y))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8)]
    down = [LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 10)]
    return nn.Sequential(*stem, ConvNeXtBlock(8), *down, ConvNeXtBlock(12), *head)


FAMILIES = [
    Family("ResNet", "images", ResNet, images(3, 32, 32)),
    Family("MobileNetV2", "images", mobilenet_v2, images(3, 16, 16)),
    Family("MobileNetV3", "images", MobileNetV3, images(3, 16, 16)),
    Family("EfficientNet-style", "images", efficientnet, images(3, 16, 16)),
    Family("DenseNet-style", "images", DenseNet, images(3, 16, 16)),
    Family("Inception-style", "images", inception, images(3, 18, 18)),
    Family("ShuffleNet-style", "images", shufflenet, images(3, 16, 16)),
    Family("ConvNeXt-style", "images", convnext, images(3, 32, 32)),
]
