"""Small models, each with one thing that capture must get right."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Conv - BN - ReLU - conv - BN - add - ReLU, the same in-place ReLU used twice."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


class Functional(nn.Module):
    """Functions instead of modules, concatenation, chunks, in-place arithmetic, a constant made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = F.hardswish(y + self.position)
        a, b = y.chunk(2, dim=1)
        y = torch.cat([b, a], dim=1)
        y = y * torch.tensor([0.5, 2.0] * 4).view(1, 8, 1, 1)
        y.add_(1.0)
        y = F.layer_norm(y.mean((2, 3)), (8,))
        scores = torch.einsum("bi,bj->bij", y, y).softmax(-1)
        return F.linear((scores @ y.unsqueeze(-1)).squeeze(-1), self.fc.weight, self.fc.bias)


class Shared(nn.Module):
    """One module called twice, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.layer(torch.tanh(self.layer(x))))


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor


class Heads(nn.Module):
    """Nested results: a dict with a tuple and a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "inner": nn.ModuleList([nn.Conv2d(4, 4, 1)])})
        self.boxes = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.body["inner"][0](self.body["stem"](x))
        return {"found": Detections(self.boxes(y), y.sigmoid().mean((2, 3))), "features": (y, y.flatten(1))}


class TwoInputs(nn.Module):
    """Two inputs and an optional third, called by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
        z = self.a(x) + self.b(y)
        return z if scale is None else z * scale


class Attention(nn.Module):
    """torch.nn's own attention, dropout, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return F.gelu(self.norm(x + self.dropout(y)))


class Recurrent(nn.Module):
    """A recurrent layer, which stays opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.fc(y[:, -1])


class Branching(nn.Module):
    """Branches on data: cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


MODELS: dict[str, tuple[type[nn.Module] | object, tuple[int, ...]]] = {
    "residual": (residual, (3, 12, 12)),
    "functional": (Functional, (3, 6, 6)),
    "heads": (Heads, (3, 6, 6)),
    "attention": (Attention, (5, 8)),
    "recurrent": (Recurrent, (5, 6)),
}
