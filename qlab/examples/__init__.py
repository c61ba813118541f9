"""Real digits, three small trained networks, and a tool that makes a network hard to quantize.

Everything here is plain PyTorch, as a user's own data and models would be.
"""

from qlab.examples.convolutional import mobilenet, resnet
from qlab.examples.data import Digits, digits
from qlab.examples.rescaling import rescale
from qlab.examples.transformer import vit

__all__ = ["Digits", "digits", "mobilenet", "rescale", "resnet", "vit"]
