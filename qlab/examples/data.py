"""Real handwritten digits, made hard enough that a quantized network can lose something.

scikit-learn ships 1,797 images of 8x8 pixels (UCI, Alpaydin and Kaynak 1998). They are enlarged to 32x32 and covered
with noise. Split, noise and order are fixed, so every run anywhere sees the same pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TRAINING_IMAGES = 1200
SIZE = 32
NOISE = 0.35


@dataclass(frozen=True)
class Digits:
    """1,200 training and 597 test images [N, 1, 32, 32] with labels [N]; ink is 1, paper is 0, plus noise."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def train(self) -> list[tuple[Tensor, Tensor]]:
        """Labelled batches of 32 training images."""
        return _batches(self.train_images, self.train_labels, 32)

    @property
    def test(self) -> list[tuple[Tensor, Tensor]]:
        """Labelled batches of 64 test images; the last one is smaller."""
        return _batches(self.test_images, self.test_labels, 64)

    def calibration(self, batches: int = 8, batch_size: int = 32) -> list[Tensor]:
        """The first `batches` batches of training images, without labels.

        Raises ValueError if more images are asked for than there are.
        """
        if not 0 < batches * batch_size <= len(self.train_images):
            raise ValueError(
                f"calibration({batches}, {batch_size}) asks for {batches * batch_size} images; "
                f"there are {len(self.train_images)} training images."
            )
        return list(self.train_images[: batches * batch_size].split(batch_size))

    def __repr__(self) -> str:
        return f"Digits({len(self.train_images)} train, {len(self.test_images)} test, images 1x{SIZE}x{SIZE})"


def digits(noise: float = NOISE) -> Digits:
    """Load the digits with Gaussian noise of standard deviation `noise`, in units of full ink.

    >>> digits()
    Digits(1200 train, 597 test, images 1x32x32)
    """
    images, labels = clean_digits()
    # RandomState and not default_rng: numpy promises that its numbers never change.
    grain = np.random.RandomState(1).standard_normal(tuple(images.shape)).astype(np.float32)
    images = images + noise * torch.from_numpy(grain)
    split = TRAINING_IMAGES
    return Digits(images[:split], labels[:split], images[split:], labels[split:])


def clean_digits() -> tuple[Tensor, Tensor]:
    """All images [1797, 1, 32, 32] in [0, 1] without noise, and labels [1797], shuffled: the first 1,200 train."""
    from sklearn.datasets import load_digits  # takes a second and is needed only here

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    small = torch.from_numpy(pixels[order] / 16).float().reshape(-1, 1, 8, 8)
    images = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(labels[order]).long()


def _batches(images: Tensor, labels: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
