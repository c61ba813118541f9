"""The text model is causal, trains the same way twice, and its data is what it says."""

import math

import pytest
import torch

import qlab.examples
from qlab.examples.text import OTHER, decode, encode


def test_text_survives_encoding():
    text = "".join(chr(code) for code in range(32, 127)) + "\n"
    assert decode(encode(text)) == text
    assert sorted(encode(text).tolist()) == list(range(OTHER))


def test_targets_are_the_inputs_moved_on_by_one_character():
    batches = qlab.examples.source_text().test
    assert [tuple(x.shape) for x, _ in batches] == [(16, 64)] * 8
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in batches)


def test_calibration_windows_come_from_the_training_text():
    text = qlab.examples.source_text()
    batches = text.calibration(batches=2, batch_size=3)
    assert [tuple(batch.shape) for batch in batches] == [(3, 64)] * 2
    assert decode(batches[0][0]) == decode(text.train_codes[:64])


def test_a_later_character_changes_no_earlier_answer():
    model = qlab.examples.char_gpt().eval()
    codes = torch.randint(97, (2, 64))
    changed = codes.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 97
    before, after = model(codes), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_a_uniform_guess_costs_the_logarithm_of_the_alphabet():
    text = qlab.examples.source_text()
    bits = qlab.examples.bits_per_character(lambda x: torch.zeros(*x.shape, 97), text.test)
    assert bits == pytest.approx(math.log2(97))


def test_training_learns_and_is_the_same_twice():
    text = qlab.examples.source_text()
    first, second = (qlab.examples.trained_char_gpt(steps=12) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    # Guessing by the frequency of characters alone costs about 4.6 bits; an untrained model 7.
    assert qlab.examples.bits_per_character(first, text.test) < 6.0


def test_training_leaves_the_global_random_numbers_alone():
    expected = torch.random.get_rng_state()
    qlab.examples.trained_char_gpt(steps=2)
    assert torch.equal(torch.random.get_rng_state(), expected)
