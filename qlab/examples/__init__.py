"""Real digits and text, small networks for them, and a tool that makes a network hard to quantize.

Everything here is plain PyTorch, as a user's own data and models would be.
"""

from qlab.examples.convolutional import mobilenet, resnet
from qlab.examples.data import Digits, digits
from qlab.examples.rescaling import rescale
from qlab.examples.text import Text, bits_per_character, source_text, trained_char_gpt
from qlab.examples.transformer import char_gpt, vit

__all__ = [
    "Digits",
    "Text",
    "bits_per_character",
    "char_gpt",
    "digits",
    "mobilenet",
    "rescale",
    "resnet",
    "source_text",
    "trained_char_gpt",
    "vit",
]
