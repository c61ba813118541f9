"""Two tiny transformers, their attention written out so that each step is quantized and seen.

`vit` reads the 32x32 digits; `char_gpt` continues text, character by character.
"""

import torch
from torch import Tensor, nn

from qlab.examples.weights import load_weights

CLASSES = 10
CHARACTERS = 97  # printable ASCII, newline, and one for all others
CONTEXT = 64


def vit(pretrained: bool = True) -> nn.Module:
    """Vision transformer in eval mode; images [N, 1, 32, 32] to logits [N, 10].

    89,386 parameters; pretrained, it names 97.0% of the test digits.
    """
    model = VisionTransformer()
    if pretrained:
        load_weights(model, "vit")
    return model.eval()


def char_gpt() -> nn.Module:
    """Untrained character GPT with 826,465 parameters; codes [N, up to 64] to logits [N, length, 97].

    `qlab.examples.text.trained_char_gpt` trains one in three minutes.
    """
    return CharGPT()


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


class CharGPT(nn.Module):
    """Character and position embeddings, four causal blocks, logits of the next character (Radford et al. 2019)."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, context=CONTEXT) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, codes: Tensor) -> Tensor:
        tokens = self.embedding(codes) + self.position_embedding[:, : codes.shape[1]]
        return self.head(self.norm(self.blocks(tokens)))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(width of a head)) v for each head, over all tokens; given a `context`, over the past."""

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)
        self.project = nn.Linear(width, width)
        future = None if context is None else torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._split_heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-2, -1)) * self.scale
        if self.future is not None:
            length = tokens.shape[1]
            scores = scores.masked_fill(self.future[:length, :length], float("-inf"))
        mixed = torch.matmul(self.softmax(scores), value)
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
