"""A tiny vision transformer for 32x32 digits, its attention written out so that each step is quantized and seen."""

import torch
from torch import Tensor, nn

from qlab.examples.weights import load_weights

CLASSES = 10


def vit(pretrained: bool = True) -> nn.Module:
    """Vision transformer in eval mode; images [N, 1, 32, 32] to logits [N, 10].

    89,386 parameters; pretrained, it names 97.0% of the test digits.
    """
    model = VisionTransformer()
    if pretrained:
        load_weights(model, "vit")
    return model.eval()


class VisionTransformer(nn.Module):
    """64 patches of 4x4 pixels and a class token, three pre-norm blocks, classifier (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding
        tokens = self.norm(self.blocks(tokens))
        return self.classifier(tokens[:, 0])


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


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
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._split_heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        weights = self.softmax(torch.matmul(query, key.transpose(-2, -1)) * self.scale)
        mixed = torch.matmul(weights, value)
        return self.project(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] -> [batch, heads, tokens, width / heads]"""
        batch, length, width = tokens.shape
        return tokens.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)


class Perceptron(nn.Module):
    """Linear to four times the width, GELU, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.project = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.gelu(self.expand(tokens)))
