"""Trains the example networks from nothing: `python -m qlab.examples.train [NAME ...]`, minutes on one CPU thread.

Deterministic: the same torch on the same kind of CPU writes the same weights. Training sees shifted, freshly noised
copies of the 1,200 training images; the score printed is on the 597 test images of `qlab.examples.digits()`.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.examples.convolutional import mobilenet, resnet
from qlab.examples.data import NOISE, TRAINING_IMAGES, clean_digits, digits
from qlab.examples.transformer import vit
from qlab.examples.weights import FOLDER, save_weights


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained, with AdamW and a one-cycle learning rate."""

    build: Callable[..., nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float = 0.05


RECIPES = {
    "mobilenet": Recipe(mobilenet, epochs=40, learning_rate=5e-3),
    "resnet": Recipe(resnet, epochs=40, learning_rate=1e-2),
    "vit": Recipe(vit, epochs=120, learning_rate=2e-3),
}


def train(recipe: Recipe, seed: int = 0) -> nn.Module:
    """Return the trained network in eval mode."""
    torch.manual_seed(seed)
    model = recipe.build(pretrained=False).train()
    images, labels = (part[:TRAINING_IMAGES] for part in clean_digits())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-TRAINING_IMAGES // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    for _ in range(recipe.epochs):
        for x, y in _augmented(images, labels):
            loss = functional.cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the labelled images that the model names correctly, 0 to 1."""
    hits = torch.cat([model(x).argmax(1) == y for x, y in batches])
    return hits.float().mean().item()


BATCH_SIZE = 32
LARGEST_SHIFT = 3


def _augmented(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; every image is moved by up to three pixels and gets fresh noise."""
    for chosen in torch.randperm(len(images)).split(BATCH_SIZE):
        x = functional.pad(images[chosen], [LARGEST_SHIFT] * 4)
        across, down = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, len(chosen))).tolist()
        size = images.shape[-1]
        moved = [
            image[:, top : top + size, left : left + size] for image, left, top in zip(x, across, down, strict=True)
        ]
        x = torch.stack(moved)
        yield x + NOISE * torch.randn_like(x), labels[chosen]


def main() -> None:
    """Train the networks named on the command line, print their scores and write their weights."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*", default=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    arguments.add_argument("--folder", type=Path, default=FOLDER, help="where the weights go")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    test = digits().test
    for name in chosen.names:
        started_s = time.monotonic()
        model = train(RECIPES[name])
        save_weights(model, name, chosen.folder)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        elapsed_s = time.monotonic() - started_s
        print(
            f"{name}: {parameters:,} parameters, test accuracy {accuracy(model, test):.1%}, {elapsed_s:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
