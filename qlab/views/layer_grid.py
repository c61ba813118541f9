"""A table of layers that a person can edit from the keyboard: a native HTML grid, thin and generic.

The state is column-wise JSON. The browser sends edits as messages, Python checks them and calls back, and answers
are sparse patches. The grid knows nothing of quantization: whoever owns it says what an edit does.
"""

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import traitlets

from qlab.views.cell_editors import CellEditor, EditRefused, Scalar, describe
from qlab.views.live_widget import LiveWidget
from qlab.views.view import STATIC_NOTE, escape

NUMBER_FORMAT = re.compile(r"\+?,?(d|(\.\d+)?[f%g])")


@dataclass(frozen=True)
class Column:
    """One column of a grid.

    title: what its header says, the name if empty; columns of one `group` stand side by side under its heading.
    format: as Python's for numbers, of the form "+,.1f" with d, f, % or g.
    bar: the value at which the bar behind the number fills the cell; None for no bar.
    """

    name: str
    title: str = ""
    group: str = ""
    format: str = ""
    bar: float | None = None
    editor: CellEditor | None = None
    help: str = ""

    def __post_init__(self) -> None:
        if self.format and not NUMBER_FORMAT.fullmatch(self.format):
            raise ValueError(f"column {self.name!r}: expected a format such as '.1f' or ',d', got {self.format!r}")

    @property
    def heading(self) -> str:
        """Title with its group, as a sentence names it."""
        return " ".join(filter(None, (self.group, self.title or self.name)))

    @property
    def is_numeric(self) -> bool:
        """Whether it is meant for numbers, though none may be known yet."""
        return bool(self.format) or self.bar is not None

    def text(self, value: Scalar) -> str:
        """The value as the cell shows it.

        >>> Column("drop", format="+.1%").text(-0.0312)
        '-3.1%'
        """
        if value is None:
            return ""
        if isinstance(value, bool):
            return "✓" if value else "–"
        if isinstance(value, str):
            return value
        if not math.isfinite(value):
            return "∞" if value > 0 else "-∞"
        spec = self.format or ("d" if float(value).is_integer() else ".4g")
        return format(round(value) if spec.endswith("d") else value, spec)


class LayerGrid(LiveWidget):
    """Rows named by their first column, as a `<table role="grid">` that edits, filters, sorts and selects.

    columns: the first holds the row keys, which must differ.
    rows: column-wise, {column name: values}; a DataFrame will do. None is an empty cell.
    allowed: narrows editors cell by cell, {column: {row: values}}; no values make the cell read-only.

    An edit is checked and then given to the callbacks of `on_edit` as (rows, column, value): one step for all selected
    rows. A callback that raises ValueError refuses the edit by its sentence; the old values come back. Any other
    exception is shown likewise and raised. `selected` holds row keys and is synced, `filter` as well.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    label = traitlets.Unicode("layers").tag(sync=True)
    status = traitlets.Unicode(help="a line beneath the rows").tag(sync=True)
    filter = traitlets.Unicode(help="words, or globs such as layer2.*").tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    height_px = traitlets.Int(420, help="rows beyond it scroll").tag(sync=True)

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Mapping[str, Sequence[Any]],
        *,
        allowed: Mapping[str, Mapping[str, Sequence[Scalar]]] | None = None,
        **traits: Any,
    ) -> None:
        self._edit_callbacks: list[Callable[[list[str], str, Scalar], object]] = []
        self._history_callbacks: dict[str, list[Callable[[], object]]] = {"undo": [], "redo": []}
        self._batched: dict[str, dict[int, Scalar]] = {}
        self._answered: dict[str, Any] = {}
        self._batch_depth = 0
        self._bookkeeping = threading.Lock()  # never held while code of others runs
        self._load(columns, rows, allowed or {})
        super().__init__(**traits)

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self._columns.values())

    @property
    def rows(self) -> list[str]:
        """The row keys, in the order given."""
        return list(self._index)

    def value(self, row: str, column: str) -> Scalar:
        return self._values[self._column(column).name][self._row(row)]

    def on_edit(self, callback: Callable[[list[str], str, Scalar], object]) -> Callable[..., object]:
        """Call back with (rows, column, value) for each edit; usable as a decorator.

        Let the callback raise: the grid shows the error and puts the old values back.
        """
        self._edit_callbacks.append(callback)
        return callback

    def on_undo(self, callback: Callable[[], object]) -> Callable[..., object]:
        """Call back when a person presses Ctrl+Z in the grid."""
        self._history_callbacks["undo"].append(callback)
        return callback

    def on_redo(self, callback: Callable[[], object]) -> Callable[..., object]:
        """Call back when a person presses Ctrl+Y or Ctrl+Shift+Z in the grid."""
        self._history_callbacks["redo"].append(callback)
        return callback

    def patch(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Set single cells, {column: {row: value}}; those that change are sent, and flash where they are in view."""
        with self.batch():
            for column, cells in changes.items():
                values = self._values[self._column(column).name]
                batched = self._batched.setdefault(column, {})
                for row, value in cells.items():
                    index, new = self._row(row), _plain(value)
                    if new != values[index] or type(new) is not type(values[index]):
                        values[index] = batched[index] = new

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Send all patches made inside as one message; batches nest."""
        with self._bookkeeping:
            self._batch_depth += 1
        try:
            yield
        finally:
            with self._bookkeeping:
                self._batch_depth -= 1
                is_last = self._batch_depth == 0
                if is_last:
                    batched, self._batched = self._batched, {}
                    answered, self._answered = self._answered, {}
            if is_last and (any(batched.values()) or answered):
                self.changed()
                cells = {
                    column: {str(index): _wire(value) for index, value in cells.items()}
                    for column, cells in batched.items()
                    if cells
                }
                self.send({"kind": "patch", "cells": cells, **answered})

    def allow(self, column: str, rows: Mapping[str, Sequence[Scalar] | None]) -> None:
        """Narrow what single cells take: no values make a cell read-only, None lifts the limit."""
        limits = self._allowed.setdefault(self._column(column).name, {})
        for row, values in rows.items():
            index = self._row(row)
            if values is None:
                limits.pop(index, None)
            else:
                limits[index] = tuple(values)
        self._send_all()

    def reset(
        self,
        rows: Mapping[str, Sequence[Any]],
        *,
        columns: Sequence[Column] | None = None,
        allowed: Mapping[str, Mapping[str, Sequence[Scalar]]] | None = None,
    ) -> None:
        """Replace all rows, and the columns if given; rows that stay keep their selection."""
        self._load(self.columns if columns is None else columns, rows, allowed or {})
        self.selected = [row for row in self.selected if row in self._index]
        self._send_all()

    def take_snapshot(self) -> dict[str, Any]:
        return {
            "columns": [
                {
                    "name": column.name,
                    "title": column.title or column.name,
                    "group": column.group,
                    "format": column.format,
                    "bar": column.bar,
                    "help": column.help,
                    "editor": describe(column.editor),
                    "numeric": column.is_numeric or any(_is_number(value) for value in self._values[column.name]),
                }
                for column in self.columns
            ],
            "rows": {name: [_wire(value) for value in values] for name, values in self._values.items()},
            "allowed": {
                name: {str(index): list(values) for index, values in cells.items()}
                for name, cells in self._allowed.items()
            },
        }

    def receive(self, message: dict[str, Any]) -> None:
        self.alert = ""
        try:
            if message["kind"] == "edit":
                self._edit(message)
            for callback in self._history_callbacks.get(message["kind"], ()):
                callback()
        except ValueError as refusal:
            self.alert = str(refusal)

    def summary(self) -> str:
        return f"LayerGrid({self.label!r}, {len(self._index)} rows, {len(self._columns)} columns)"

    def to_html(self, limit: int = 12) -> str:
        """The first rows as a plain HTML table."""
        head = "".join(f"<th>{escape(column.heading)}</th>" for column in self.columns)
        shown = min(limit, len(self._index))
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(c.text(self._values[c.name][i]))}</td>' for c in self.columns)}</tr>"
            for i in range(shown)
        )
        more = f"<p>… {len(self._index) - shown} more</p>" if shown < len(self._index) else ""
        return (
            f"<table><caption>{escape(self.label)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{more}{STATIC_NOTE}"
        )

    def _load(
        self,
        columns: Sequence[Column],
        rows: Mapping[str, Sequence[Any]],
        allowed: Mapping[str, Mapping[str, Sequence[Scalar]]],
    ) -> None:
        missing = [column.name for column in columns if column.name not in rows]
        if missing or not columns:
            raise ValueError(f"expected values for each column, got none for {', '.join(missing) or 'any'}")
        values = {column.name: [_plain(value) for value in rows[column.name]] for column in columns}
        keys = [str(key) for key in values[columns[0].name]]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"expected row keys that differ, got {twice!r} twice in column {columns[0].name!r}")
        lengths = {name: len(column) for name, column in values.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of one length, got {lengths}")
        self._columns = {column.name: column for column in columns}
        self._values = values
        self._index = {key: index for index, key in enumerate(keys)}
        self._allowed: dict[str, dict[int, tuple[Scalar, ...]]] = {
            self._column(column).name: {self._row(row): tuple(values) for row, values in cells.items()}
            for column, cells in allowed.items()
        }

    def _column(self, name: str) -> Column:
        try:
            return self._columns[name]
        except KeyError:
            raise ValueError(f"expected one of the columns {', '.join(self._columns)}, got {name!r}") from None

    def _row(self, key: str) -> int:
        try:
            return self._index[key]
        except KeyError:
            raise ValueError(f"there is no row {key!r} in {self.label}") from None

    def _edit(self, message: dict[str, Any]) -> None:
        with self.batch():
            self._answered = {"answered": message.get("id")}
            rows, column, value = self._accept(message["rows"], message["column"], message["value"])
            before = {row: self.value(row, column) for row in rows}
            self.patch({column: dict.fromkeys(rows, value)})
            try:
                for callback in self._edit_callbacks:
                    callback(rows, column, value)
            except Exception:
                self.patch({column: before})
                raise
            left_out = len(message["rows"]) - len(rows)
            verb = "does" if left_out == 1 else "do"
            self._answered["notice"] = f"{left_out} of the selected rows {verb} not take it." if left_out else ""

    def _accept(self, rows: Sequence[str], name: str, typed: object) -> tuple[list[str], str, Scalar]:
        """The rows that take the value, which must be one at least: a selection often holds layers of several kinds."""
        column = self._column(name)
        limits = self._allowed.get(name, {})
        accepted: dict[str, Scalar] = {}
        refusal = ""
        for row in rows:
            allowed = limits.get(self._row(row))
            try:
                if column.editor is None or allowed == ():
                    raise EditRefused("cannot be changed")
                accepted[row] = column.editor.accept(typed, allowed)
            except EditRefused as reason:
                refusal = refusal or f"{column.heading[:1].upper()}{column.heading[1:]} of {row} {reason}."
        if not accepted:
            raise EditRefused(refusal or "No row was named.")
        return list(accepted), name, next(iter(accepted.values()))

    def _send_all(self) -> None:
        self.changed()
        self.send({"kind": "reset", "snapshot": self.take_snapshot()})

    @traitlets.validate("selected")
    def _only_known_rows(self, proposal: Any) -> list[str]:
        unknown = [row for row in proposal["value"] if row not in self._index]
        if unknown and not self._property_lock:  # the browser may name rows that have gone meanwhile
            raise traitlets.TraitError(f"there is no row {unknown[0]!r} in {self.label}")
        return [row for row in proposal["value"] if row in self._index]


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Scalar:
    """A cell's value without numpy, torch or pandas: NaN and its like become None, other objects text."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value is pandas.NA or value != value:
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)


def _wire(value: Scalar) -> Scalar:
    """JSON has no infinity; the browser reads it from these words."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
