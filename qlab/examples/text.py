"""Python's own source as text to model: real, on every machine, and free; and a small GPT trained on it in minutes.

The text differs a little between Python versions, so scores on it are comparable only within one.
"""

import math
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.examples.transformer import CHARACTERS, CONTEXT, char_gpt

TRAINING_MODULES = ["argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "inspect", "ipaddress"]
TRAINING_MODULES += ["optparse", "pdb", "pickle", "subprocess", "tarfile", "threading", "typing"]
TEST_MODULES = ["shutil", "statistics", "textwrap"]
OTHER = CHARACTERS - 1


@dataclass(frozen=True)
class Text:
    """Codes 0 to 96 of a training text and of a test text, each [length]."""

    train_codes: Tensor
    test_codes: Tensor

    @property
    def test(self) -> list[tuple[Tensor, Tensor]]:
        """Eight batches of 16 windows [16, 64], evenly spread over the test text, with the characters that follow."""
        starts = torch.linspace(0, len(self.test_codes) - CONTEXT - 1, 8 * 16).long()
        return [_windows(self.test_codes, chosen) for chosen in starts.split(16)]

    def calibration(self, batches: int = 4, batch_size: int = 16) -> list[Tensor]:
        """Batches of windows [batch_size, 64], evenly spread over the training text."""
        starts = torch.linspace(0, len(self.train_codes) - CONTEXT - 1, batches * batch_size).long()
        return [_windows(self.train_codes, chosen)[0] for chosen in starts.split(batch_size)]

    def training_batch(self, generator: torch.Generator, batch_size: int = 8) -> tuple[Tensor, Tensor]:
        """Random windows of the training text and the characters that follow."""
        starts = torch.randint(len(self.train_codes) - CONTEXT, (batch_size,), generator=generator)
        return _windows(self.train_codes, starts)

    def __repr__(self) -> str:
        return f"Text({len(self.train_codes):,} train, {len(self.test_codes):,} test characters)"


def source_text() -> Text:
    """Load the source of fifteen standard-library modules to train on and of three others to test on."""
    return Text(_codes(TRAINING_MODULES), _codes(TEST_MODULES))


def bits_per_character(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean of -log2 p(next character); 6.6 is guessing among 97, lower is better."""
    with torch.no_grad():
        losses = [functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none") for x, y in batches]
    return torch.cat(losses).mean().item() / math.log(2)


def trained_char_gpt(steps: int = 2400, seed: int = 0) -> nn.Module:
    """Return `char_gpt` after a short training on `source_text`, in eval mode.

    The default takes three minutes on one CPU thread and reaches about 2.7 bits per character.
    """
    text = source_text()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = char_gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y = text.training_batch(generator)
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def encode(text: str) -> Tensor:
    """Codes [length] of the characters: 0 is newline, 1 to 95 printable ASCII, 96 any other.

    >>> encode("a\\n~é").tolist()
    [66, 0, 95, 96]
    """
    return torch.tensor([0 if c == "\n" else ord(c) - 31 if " " <= c <= "~" else OTHER for c in text])


def decode(codes: Tensor) -> str:
    """The text that `encode` turned into these codes; other characters become a question mark in a box.

    >>> decode(encode("def f(x):"))
    'def f(x):'
    """
    return "".join("\n" if code == 0 else "\ufffd" if code == OTHER else chr(code + 31) for code in codes.tolist())


def _codes(modules: list[str]) -> Tensor:
    folder = Path(sysconfig.get_path("stdlib"))
    return encode("\n".join((folder / f"{module}.py").read_text(encoding="utf-8") for module in modules))


def _windows(codes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of CONTEXT codes at each start, and the same moved on by one character."""
    positions = starts[:, None] + torch.arange(CONTEXT)
    return codes[positions], codes[positions + 1]
