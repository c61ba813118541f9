"""The trained weights that ship with qlab, one safetensors file a network."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(__file__).parent


def load_weights(model: nn.Module, name: str, folder: Path = FOLDER) -> None:
    """Change `model`: its parameters and buffers become those of `name`.safetensors."""
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))


def save_weights(model: nn.Module, name: str, folder: Path = FOLDER) -> None:
    """Write `model`'s parameters and buffers to `name`.safetensors."""
    save_file(model.state_dict(), folder / f"{name}.safetensors")
