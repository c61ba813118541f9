"""Errors that say what was expected, what came, where, and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class QlabError(Exception):
    """The base of every error that qlab raises on purpose."""


class CaptureError(QlabError):
    """The model could not be turned into a graph of layers."""


class NeedsCapture(QlabError):
    """Something needs the graph of a model that could not be captured and runs module by module."""


class InputError(QlabError, ValueError):
    """A batch does not fit what the model was captured with."""


class NotCalibrated(QlabError, RuntimeError):
    """A quantizer has no encoding yet."""


class NonFiniteData(QlabError, ValueError):
    """A tensor that should be measured holds NaN or infinity."""


class SpecError(QlabError, ValueError):
    """A quantizer was asked for something that no integer grid offers."""


class UnknownLayer(QlabError, KeyError):
    """A layer name that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class Busy(QlabError, RuntimeError):
    """Something is changing the sim just now; wait for it or cancel it."""


class HistoryError(QlabError, LookupError):
    """A state of the past cannot be returned to."""


class Cancelled(QlabError):
    """A long operation was cancelled; what it had changed is restored."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A phrase that offers the names closest to `name`, or the first few when none is close.

    >>> nearest("conv", ["conv1", "fc"])
    "Did you mean 'conv1'?"
    """
    known = list(names)
    close = get_close_matches(name, known, n=3, cutoff=0.5) or [n for n in known if name.lower() in n.lower()][:3]
    if close:
        return "Did you mean " + " or ".join(repr(n) for n in close) + "?"
    return "Known are " + ", ".join(repr(n) for n in known[:5]) + (", ..." if len(known) > 5 else "") + "."
