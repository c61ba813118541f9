"""The digits are the same everywhere, and a user can feed them to anything."""

import pytest
import torch
from sklearn.datasets import load_digits

import qlab.examples
from qlab.examples.data import clean_digits


def test_digits_are_scikit_learns_images_enlarged():
    images, labels = clean_digits()
    original = load_digits()
    assert images.shape == (1797, 1, 32, 32)
    assert torch.bincount(labels).tolist() == torch.bincount(torch.tensor(original.target)).tolist()
    # Bilinear enlargement by an even factor keeps the mean of every image away from its borders' weights.
    assert images.mean().item() == pytest.approx(original.images.mean() / 16, abs=1e-3)


def test_two_loads_give_the_same_pixels():
    first, second = qlab.examples.digits(), qlab.examples.digits()
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)


def test_train_and_test_share_no_image():
    clean = qlab.examples.digits(noise=0.0)
    train = {image.numpy().tobytes() for image in clean.train_images}
    test = {image.numpy().tobytes() for image in clean.test_images}
    assert len(train) + len(test) == 1797
    assert not train & test


def test_noise_has_the_standard_deviation_asked_for():
    noise = qlab.examples.digits(noise=0.5).test_images - qlab.examples.digits(noise=0.0).test_images
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)


def test_calibration_gives_unlabelled_batches_of_training_images():
    digits = qlab.examples.digits()
    batches = digits.calibration(batches=3, batch_size=16)
    assert [tuple(batch.shape) for batch in batches] == [(16, 1, 32, 32)] * 3
    assert torch.equal(torch.cat(batches), digits.train_images[:48])


def test_calibration_says_how_many_images_there_are():
    with pytest.raises(ValueError, match=r"asks for 3200 images; there are 1200 training images"):
        qlab.examples.digits().calibration(batches=100, batch_size=32)


def test_labelled_batches_hold_every_image_once():
    digits = qlab.examples.digits()
    assert sum(len(labels) for _, labels in digits.train) == 1200
    assert torch.equal(torch.cat([labels for _, labels in digits.test]), digits.test_labels)
