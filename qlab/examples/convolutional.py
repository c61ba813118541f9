"""Two small convolutional networks for 32x32 digits, in the styles that quantization papers report on.

`mobilenet` has depthwise convolutions, which are hard to quantize; `resnet` has residual additions around plain ones.
Both use BatchNorm and ReLU, so folding and cross-layer equalization apply.
"""

from collections import OrderedDict

from torch import Tensor, nn

from qlab.examples.weights import load_weights

CLASSES = 10


def mobilenet(pretrained: bool = True) -> nn.Module:
    """MobileNetV2-style network in eval mode; images [N, 1, 32, 32] to logits [N, 10].

    68,442 parameters; pretrained, it names 98.5% of the test digits.
    """
    model = MobileNet()
    if pretrained:
        load_weights(model, "mobilenet")
    return model.eval()


def resnet(pretrained: bool = True) -> nn.Module:
    """ResNet-20-style network in eval mode; images [N, 1, 32, 32] to logits [N, 10].

    68,642 parameters; pretrained, it names 98.8% of the test digits.
    """
    model = ResNet()
    if pretrained:
        load_weights(model, "resnet")
    return model.eval()


class MobileNet(nn.Module):
    """Stem, eight inverted residual blocks, a 1x1 head, mean over positions, classifier (Sandler et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm_relu(1, 16, kernel_size=3, stride=2)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, expansion=2, stride=1),
            InvertedResidual(16, 24, expansion=4, stride=2),
            InvertedResidual(24, 24, expansion=4, stride=1),
            InvertedResidual(24, 32, expansion=4, stride=2),
            InvertedResidual(32, 32, expansion=4, stride=1),
            InvertedResidual(32, 32, expansion=4, stride=1),
            InvertedResidual(32, 40, expansion=4, stride=1),
            InvertedResidual(40, 40, expansion=4, stride=1),
        )
        self.head = _conv_norm_relu(40, 96, kernel_size=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(96, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(images)))
        return self.classifier(self.flatten(self.pool(features)))


class InvertedResidual(nn.Module):
    """Widen with 1x1, filter each channel by itself, narrow with 1x1; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _conv_norm_relu(inputs, wide, kernel_size=1)
        self.depthwise = _conv_norm_relu(wide, wide, kernel_size=3, stride=stride, groups=wide)
        self.project = _conv_norm(wide, outputs, kernel_size=1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class ResNet(nn.Module):
    """Three stages of three basic blocks with 8, 16 and 32 channels (He et al. 2016, half as wide as ResNet-20)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, stride=2), BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer3 = nn.Sequential(BasicBlock(16, 32, stride=2), BasicBlock(32, 32), BasicBlock(32, 32))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same_shape = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same_shape else _conv_norm(inputs, outputs, kernel_size=1, stride=stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def _conv_norm(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel_size // 2
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def _conv_norm_relu(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = _conv_norm(inputs, outputs, kernel_size, stride, groups)
    layers.add_module("relu", nn.ReLU())
    return layers
