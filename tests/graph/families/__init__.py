"""Model families in plain torch.nn, small enough for a test: what `capture` must be able to read.

`FAMILIES` holds one entry a family; `hugging_face` adds those of an installed transformers. benchmarks/families.py
prints the table of docs/families.md from the same entries.
"""

from tests.graph.families import convolutional, dense_prediction, other, sequences, transformers_plain
from tests.graph.families.family import Family

FAMILIES: list[Family] = [
    *convolutional.FAMILIES,
    *dense_prediction.FAMILIES,
    *transformers_plain.FAMILIES,
    *sequences.FAMILIES,
    *other.FAMILIES,
]

__all__ = ["FAMILIES", "Family"]
