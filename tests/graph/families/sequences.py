"""Recurrent and convolutional networks over time; recurrent layers stay opaque."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.graph.families.family import Family, images, tokens


class Tagger(nn.Module):
    """A bidirectional LSTM of two layers over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(16, 5)

    def forward(self, numbers: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(numbers))
        return F.log_softmax(self.fc(y), dim=-1)


class SpeechGRU(nn.Module):
    """Convolutions over time, a GRU, its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(6, 8, 3, 2, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(self.conv(x).transpose(1, 2))
        return self.fc(y), self.fc(state[-1])


class Cells(nn.Module):
    """A recurrent cell unrolled by a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.fc(state)


class WaveNet(nn.Module):
    """Causal dilated convolutions, gates, weight norm, skips summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, 8, 1)
        self.gated = nn.ModuleList([weight_norm(nn.Conv1d(8, 16, 2, dilation=2**i)) for i in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)])
        self.out = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | float = 0.0
        for i, (conv, skip) in enumerate(zip(self.gated, self.skips, strict=True)):
            value, gate = conv(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + y
        return self.out(F.leaky_relu(total, 0.1))


FAMILIES = [
    Family("LSTM tagger, bidirectional", "sequences", Tagger, tokens(9, 30)),
    Family("GRU over convolutions", "sequences", SpeechGRU, images(6, 16)),
    Family("Recurrent cell in a loop", "sequences", Cells, images(5, 6)),
    Family("WaveNet-style, weight norm", "sequences", WaveNet, images(4, 16)),
]
