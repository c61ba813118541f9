"""A moment of a lab: what was done up to it, so that a result can say whether it still holds."""

from qlab.lab import Lab

Moment = tuple[str, ...]


def moment_of(lab: Lab) -> Moment:
    """The actions that led to the present state; equal again after an undo."""
    return tuple(lab.history["action"].iloc[: lab.step + 1])
