"""Techniques that win back accuracy, one file each; importing one here is all it takes to offer it."""

from qlab.techniques.technique import TECHNIQUES, Report, Technique

__all__ = ["TECHNIQUES", "Report", "Technique"]
