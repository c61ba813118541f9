"""Ways of writing a model that readers of graphs stumble over: functions for everything, nested and absent results."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.families.family import Family, images


class Functional(nn.Module):
    """Parameters and buffers of its own; every step a function."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.zeros(8))
        self.gamma, self.beta = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(10, 8) * 0.3)
        self.register_buffer("mean", torch.randn(8) * 0.1)
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.kernel, self.bias)
        x = F.batch_norm(x, self.mean, self.variance, self.gamma, self.beta, self.training)
        x = F.max_pool2d(F.elu(x), 2)
        x = F.normalize(F.instance_norm(x), dim=1)
        x = torch.where(x > 0, x, 0.1 * x).abs().clamp(min=1e-3).sqrt()
        x = x.amax((2, 3)).sub(0.1).div(2).neg()
        return F.softmax(F.linear(F.softplus(x), self.matrix), dim=1)


@dataclass
class Result:
    """A result with a part that may be missing."""

    embedding: Tensor
    logits: Tensor | None = None


class Recommender(nn.Module):
    """Inputs by name, bags of tokens, pairwise products by einsum, a dataclass with a missing part."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.users = nn.EmbeddingBag(40, 8, mode="mean"), nn.Embedding(20, 8)
        self.dense = nn.Sequential(nn.Linear(5, 16), nn.Mish(), nn.Linear(16, 8), nn.Tanh())
        self.top = nn.Linear(9, 4)

    def forward(self, user: Tensor, items: Tensor, dense: Tensor) -> dict[str, object]:
        parts = torch.stack([self.users(user), self.items(items), self.dense(dense)], dim=1)
        products = torch.einsum("bif,bjf->bij", parts, parts).flatten(1)
        return {"user": Result(parts[:, 0]), "all": Result(products, self.top(products)), "loss": None}


class Siamese(nn.Module):
    """One tower called twice, cosine similarity of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.tower(a), dim=-1), F.normalize(self.tower(b), dim=-1)
        return self.scale.exp() * (a * b).sum(-1)


class Autoencoder(nn.Module):
    """A latent with mean and spread; in training noise is added, in eval the mean is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.SELU(), nn.Linear(16, 12), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x).tensor_split(2, dim=-1)
        latent = mean + torch.exp(0.5 * spread) * torch.randn_like(mean) if self.training else mean
        return self.decoder(latent), mean, spread


FAMILIES = [
    Family("Functions only", "other", Functional, images(3, 10, 10)),
    Family(
        "Recommender with named inputs",
        "other",
        Recommender,
        lambda n: {
            "user": torch.randint(0, 20, (n,)),
            "items": torch.randint(0, 40, (n, 3)),
            "dense": torch.randn(n, 5),
        },
    ),
    Family("Siamese towers", "other", Siamese, lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8))),
    Family("Variational autoencoder", "other", Autoencoder, images(12)),
]
