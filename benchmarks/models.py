"""Full-size networks in plain torch.nn for timing, with random weights; their accuracy is not the point.

Layer shapes are the published ones, so that a time here is a time for ResNet-18, ResNet-50, MobileNetV2, ViT-B/16 and
a BERT-base encoder. `warmed_up` gives BatchNorm statistics that fit the weights, without which ranges explode. `load`
gives these, and the trained networks of the digits, by name, each with the batch that its figures are told for.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

CLASSES = 1000
DIGITS = {"digits_mobilenet": "mobilenet", "digits_resnet": "resnet"}
LARGE = ("resnet50", "mobilenet_v2", "vit_b_16", "bert_base_encoder")
NAMES = (*DIGITS, "resnet18", *LARGE)
IMAGES, TOKENS = (8, 3, 224, 224), (8, 128, 768)


def load(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and one batch: 64 digits, 8 images of noise, or 8 x 128 tokens of noise."""
    if name in DIGITS:
        from qlab import examples

        return getattr(examples, DIGITS[name])(), examples.digits().test_images[:64]
    build = {
        "resnet18": resnet18,
        "resnet50": resnet50,
        "mobilenet_v2": mobilenet_v2,
        "vit_b_16": vit_b_16,
        "bert_base_encoder": bert_base_encoder,
    }[name]
    size = TOKENS if name == "bert_base_encoder" else IMAGES
    return warmed_up(build(), size), torch.randn(size)


def warmed_up(model: nn.Module, size: tuple[int, ...], passes: int = 4) -> nn.Module:
    """Return a copy in eval mode with the BatchNorm statistics of a few passes of noise of shape `size`.

    For example `warmed_up(resnet18(), (8, 3, 224, 224))`.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return copy.deepcopy(model).eval()
    warm = copy.deepcopy(model).train()
    for module in warm.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the passes
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(passes):
            warm(torch.randn(size, generator=generator))
    return warm.eval()


def resnet18() -> nn.Module:
    """11.7 M parameters; images [N, 3, 224, 224] to logits [N, 1000] (He et al. 2016)."""
    return ResNet(BasicBlock, blocks=(2, 2, 2, 2))


def resnet50() -> nn.Module:
    """25.6 M parameters; images [N, 3, 224, 224] to logits [N, 1000] (He et al. 2016)."""
    return ResNet(Bottleneck, blocks=(3, 4, 6, 3))


def mobilenet_v2() -> nn.Module:
    """3.5 M parameters; images [N, 3, 224, 224] to logits [N, 1000] (Sandler et al. 2018)."""
    return MobileNetV2()


def vit_b_16() -> nn.Module:
    """86.6 M parameters; images [N, 3, 224, 224] to logits [N, 1000] (Dosovitskiy et al. 2021)."""
    return VisionTransformer()


def bert_base_encoder() -> nn.Module:
    """85.1 M parameters without embeddings; tokens [N, length, 768] to the same shape (Devlin et al. 2019)."""
    return nn.Sequential(*(Block(768, heads=12, pre_norm=False, eps=1e-12) for _ in range(12)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 to narrow, 3x3, 1x1 to widen four times, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """7x7 stem, max-pool, four stages of residual blocks, mean over positions, classifier."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, inputs = [], 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            stage_blocks = []
            for index in range(count):
                stage_blocks.append(block(inputs, width, stride=2 if index == 0 and stage > 0 else 1))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*stage_blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks at width 1.0, with ReLU6."""

    # expansion, outputs, repeats, stride of the first (table 2 of the paper)
    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm_relu6(3, 32, kernel_size=3, stride=2)
        blocks, inputs = [], 32
        for expansion, outputs, repeats, stride in self.SETTINGS:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, expansion, stride if index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv_norm_relu6(inputs, 1280, kernel_size=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(1280, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(images)))
        return self.classifier(self.flatten(self.avgpool(x)))


class InvertedResidual(nn.Module):
    """Widen with 1x1 unless the expansion is 1, filter each channel by itself, narrow with 1x1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = nn.Identity() if expansion == 1 else _conv_norm_relu6(inputs, wide, kernel_size=1)
        self.depthwise = _conv_norm_relu6(wide, wide, kernel_size=3, stride=stride, groups=wide)
        self.project = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(wide, outputs, 1, bias=False), norm=nn.BatchNorm2d(outputs))
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


def _conv_norm_relu6(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU6()))


class VisionTransformer(nn.Module):
    """196 patches of 16x16 pixels and a class token, twelve pre-norm blocks of width 768."""

    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + 14 * 14, width))
        self.blocks = nn.Sequential(*(Block(width, heads, pre_norm=True, eps=1e-6) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding
        return self.classifier(self.norm(self.blocks(tokens))[:, 0])


class Block(nn.Module):
    """Attention and perceptron with LayerNorm before each (ViT) or after each addition (BERT)."""

    def __init__(self, width: int, heads: int, pre_norm: bool, eps: float) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.expand = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.project = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.pre_norm:
            tokens = tokens + self.attention(self.norm1(tokens))
            return tokens + self.project(self.gelu(self.expand(self.norm2(tokens))))
        tokens = self.norm1(tokens + self.attention(tokens))
        return self.norm2(tokens + self.project(self.gelu(self.expand(tokens))))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(width of a head)) v over all tokens, for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._split_heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        weights = self.softmax(torch.matmul(query, key.transpose(-2, -1)) * self.scale)
        return self.output(torch.matmul(weights, value).transpose(1, 2).flatten(2))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, heads, length, width / heads]"""
        batch, length, width = tokens.shape
        return tokens.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)
