"""Transformers written out: vision, windows, encoder and decoder, rotary language models, mixers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.families.family import Family, images, tokens


class SelfAttention(nn.Module):
    """Heads by reshape, the fused attention function of torch."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.project(y.transpose(1, 2).reshape(b, n, c))


class PreNormBlock(nn.Module):
    """LayerNorm before attention and before the MLP; dropout as a function."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), 0.1, self.training)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, a class token, learned positions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(PreNormBlock(width, 2), PreNormBlock(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowBlock(nn.Module):
    """Attention inside windows, shifted by roll, with a relative position bias and a mask between windows."""

    mask: Tensor
    index: Tensor

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.size, self.window, self.shift = heads, size, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (at[:, :, None] - at[:, None, :]) + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        region = torch.zeros(1, size, size, 1)
        for number, (rows, columns) in enumerate(
            (r, c)
            for r in (slice(0, -window), slice(-window, -shift or None), slice(-shift or size, None))
            for c in (slice(0, -window), slice(-window, -shift or None), slice(-shift or size, None))
        ):
            region[:, rows, columns] = number
        windows = self.split(region).squeeze(-1)
        self.register_buffer("mask", (windows[:, None] != windows[:, :, None]).float() * -100.0)

    def split(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def join(self, x: Tensor, b: int) -> Tensor:
        n = self.size // self.window
        x = x.view(b, n, n, self.window, self.window, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, self.size, self.size, -1)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias_table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        if self.shift:
            count = self.mask.shape[0]
            scores = scores.view(b // count, count, self.heads, n, n) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, n, n)
        return self.project((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.join(self.attend(self.split(y)), x.shape[0])
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two window blocks, patches merged by strided slices."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.plain, self.shifted = WindowBlock(width, 2, 8, 4, 0), WindowBlock(width, 2, 8, 4, 2)
        self.merge = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shifted(self.plain(self.patches(x).permute(0, 2, 3, 1)))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.head(self.norm(self.merge(torch.cat(parts, -1))).mean((1, 2)))


class Translator(nn.Module):
    """torch.nn.Transformer with a causal mask, a padding mask and sinusoidal positions."""

    positions: Tensor

    def __init__(self, vocabulary: int = 30, width: int = 16) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 2, 1, 1, 32, batch_first=True)
        self.generator = nn.Linear(width, vocabulary)
        angles = torch.arange(16)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == 0
        causal = nn.Transformer.generate_square_subsequent_mask(target.size(1), device=target.device)
        a = self.source(source) * 4.0 + self.positions[: source.size(1)]
        b = self.target(target) * 4.0 + self.positions[: target.size(1)]
        y = self.transformer(
            a, b, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.generator(y)


class MaskedEncoder(nn.Module):
    """BERT-like: post-norm, scores with an additive mask made from token numbers, output tied to the embedding."""

    def __init__(self, vocabulary: int = 30, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(12, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, numbers: Tensor) -> Tensor:
        b, n = numbers.shape
        x = self.dropout(self.words(numbers) + self.places(torch.arange(n, device=numbers.device)))
        mask = (1.0 - (numbers != 0).float())[:, None, None, :] * torch.finfo(x.dtype).min
        q, k, v = (f(x).view(b, n, 2, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = self.dropout(torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8) + mask, dim=-1))
        x = self.norm1(x + self.dropout(self.out((weights @ v).transpose(1, 2).contiguous().view(b, n, -1))))
        return self.decoder(self.norm2(x + self.down(F.gelu(self.up(x), approximate="tanh"))))


class GPT(nn.Module):
    """Causal blocks, learned positions, logits of the last token as well as all."""

    def __init__(self, vocabulary: int = 30, width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(12, width)
        self.blocks = nn.ModuleList([PreNormBlock(width, 2, causal=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(numbers) + self.wpe(torch.arange(numbers.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, logits[:, [-1], :]


class RMSNorm(nn.Module):
    """Root mean square norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class LlamaBlock(nn.Module):
    """Rotary positions, grouped keys and values, SwiGLU."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.rotate(self.q(y).view(b, n, self.heads, self.size).transpose(1, 2), cos, sin)
        k = self.rotate(self.k(y).view(b, n, self.groups, self.size).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, n, self.groups, self.size).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3)) * self.size**-0.5
        mask = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        x = x + self.o(((scores + mask).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Rotary tables as buffers, two blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, vocabulary: int = 30, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([LlamaBlock(width, 4, 2) for _ in range(2)])
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        angles = torch.outer(torch.arange(16).float(), 10000 ** (-torch.arange(0, 4, 2).float() / 4)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        x, n = self.embed(numbers), numbers.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n])
        return self.head(self.norm(x))


class Mixer(nn.Module):
    """MLP-Mixer: tokens and channels mixed in turn."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.over_channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.over_tokens(self.norm1(x).mT).mT
        x = x + self.over_channels(self.norm2(x))
        return self.head(x.mean(1))


class CrossAttention(nn.Module):
    """A Perceiver: learned queries look at the input through torch.nn's attention, weights returned too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, width))
        self.into = nn.Linear(6, width)
        self.cross = nn.MultiheadAttention(width, 2, batch_first=True)
        self.own = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, activation="gelu", norm_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.into(x)
        queries = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        y, weights = self.cross(queries, keys, keys)
        return self.head(self.own(queries + y).mean(1)), weights


FAMILIES = [
    Family("ViT", "transformers", ViT, images(3, 16, 16)),
    Family("Swin-style windows", "transformers", Swin, images(3, 16, 16)),
    Family(
        "Encoder-decoder (nn.Transformer)",
        "transformers",
        Translator,
        lambda n: (torch.randint(0, 30, (n, 10)), torch.randint(1, 30, (n, 8))),
    ),
    Family("Masked encoder (BERT-style)", "transformers", MaskedEncoder, tokens(10, 30)),
    Family("Causal decoder (GPT-style)", "transformers", GPT, tokens(10, 30)),
    Family("Rotary decoder (Llama-style)", "transformers", Llama, tokens(10, 30)),
    Family("MLP-Mixer", "transformers", Mixer, images(3, 16, 16)),
    Family("Cross-attention (Perceiver-style)", "transformers", CrossAttention, images(10, 6)),
]
