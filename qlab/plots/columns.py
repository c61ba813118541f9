"""Reads the columns that a figure expects out of a DataFrame, and says clearly which are missing or not numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


class WrongColumns(ValueError):
    """A frame lacks a column that the figure needs, or a column that should hold numbers does not."""


def read_frame(frame: pd.DataFrame | Mapping, columns: Sequence[str], where: str) -> pd.DataFrame:
    """Return the frame with a plain index after checking that it has `columns`.

    A frame without rows passes with any columns: it becomes an empty figure.
    Raises WrongColumns naming what is missing, TypeError if it is no table.
    """
    if not isinstance(frame, pd.DataFrame):
        if not isinstance(frame, Mapping):
            raise TypeError(f"{where} takes a pandas DataFrame or a dict of columns, not {type(frame).__name__}.")
        frame = pd.DataFrame(frame)
    if frame.empty:
        return pd.DataFrame({column: [] for column in [*frame.columns, *columns]})
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise WrongColumns(
            f"{where} needs the columns {_listed(columns)}; missing: {_listed(missing)}. "
            f"The frame has {_listed(frame.columns)}. Rename them with frame.rename(columns={{'old': 'new'}})."
        )
    return frame.reset_index(drop=True)


def numbers(frame: pd.DataFrame, column: str, where: str) -> np.ndarray:
    """Return a column as float64 (missing values become NaN); raises WrongColumns for text."""
    try:
        return pd.to_numeric(frame[column]).to_numpy(dtype=float, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise WrongColumns(f"{where} needs numbers in column '{column}': {error}.") from None


def texts(frame: pd.DataFrame, column: str) -> list[str]:
    """Return a column as text; absent column and missing values become the empty string."""
    if column not in frame.columns:
        return [""] * len(frame)
    return ["" if pd.isna(value) else str(value) for value in frame[column]]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "no columns"
