"""The table of layers: what each is asked for and what that costs, edited in place."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlab.errors import Busy
from qlab.lab import Lab
from qlab.lab.rows import LayerRow
from qlab.quantization import RULE_NAMES
from qlab.views.cell_editors import Choice, Flag, Scalar
from qlab.views.layer_grid import Column, LayerGrid
from qlab.views.view import View

BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
FULL_BAR_DB = 60.0
_NO_CHOICE: tuple[Scalar, ...] = ()

_COLUMNS = (
    Column("name", "layer"),
    Column("title", "kind"),
    Column("weight_bits", "bits", "weight", editor=Choice(BITS)),
    Column("weight_granularity", "grids", "weight", editor=Choice(("per_tensor", "per_channel"))),
    Column("weight_enabled", "on", "weight", editor=Flag(), help="whether the weight is quantized"),
    Column("weight_sqnr", "SQNR", "weight", ".1f", FULL_BAR_DB, help="signal to quantization noise of the weight, dB"),
    Column("output_bits", "bits", "output", editor=Choice(BITS)),
    Column("output_rule", "range", "output", editor=Choice(RULE_NAMES), help="how the range is chosen"),
    Column("output_enabled", "on", "output", editor=Flag(), help="whether the output is quantized"),
    Column("output_sqnr", "SQNR", "output", ".1f", FULL_BAR_DB, help="of the output alone, from its histogram, dB"),
    Column("noise", "noise", "", ".1f", FULL_BAR_DB, help="SQNR of the layer's value in the running model, dB"),
)


@dataclass(frozen=True)
class _Cells:
    """What one row shows, and which of its cells cannot be edited."""

    values: dict[str, Scalar]
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, row: LayerRow, noise: float | None) -> "_Cells":
        values: dict[str, Any] = {column.name: getattr(row, column.name, None) for column in _COLUMNS}
        values["noise"] = noise
        owns_output = row.grid == row.name
        fixed: list[str] = []
        for column in _COLUMNS:
            has_part = row.weight_bits is not None if column.group == "weight" else owns_output
            if column.group and not has_part:
                values[column.name] = None
                fixed.append(column.name)
        return cls(values, tuple(name for name in fixed if _EDITABLE[name]))


_EDITABLE = {column.name: column.editor is not None for column in _COLUMNS}


class LayerTable(View):
    """One row a layer that has a quantizer, editable; every edit is one step of the lab's history.

    Fused layers and those that inherit a grid show no output of their own: their output is set where it is rounded.
    all_layers: show those without any quantizer too.
    """

    def __init__(self, lab: Lab, *, all_layers: bool = False, height_px: int = 420) -> None:
        super().__init__(lab)
        self._lab = lab
        noise = lab.noise
        cells = {name: _Cells.of(lab.layer_row(name), noise.get(name)) for name in self._names(all_layers)}
        self.grid = LayerGrid(
            _COLUMNS,
            {column.name: [cell.values[column.name] for cell in cells.values()] for column in _COLUMNS},
            allowed={
                column.name: {name: _NO_CHOICE for name, cell in cells.items() if column.name in cell.fixed}
                for column in _COLUMNS
                if column.editor is not None
            },
            label="layers",
            height_px=height_px,
        )
        self._shown = set(cells)
        self.grid.on_edit(self._edit)
        self.grid.on_undo(self.guarded(lab.undo))
        self.grid.on_redo(self.guarded(lab.redo))
        self.grid.observe(self.guarded(self._grid_selected), "selected")
        self.listen(lab.events.edited, self._patch)
        self.listen(lab.events.noise, self._patch_noise)
        self.listen(lab.events.selected, self._lab_selected)
        self._lab_selected(lab.selected)
        self.display(self.grid)

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"LayerTable({len(self.grid.rows)} layers)"

    def to_html(self) -> str:
        """The first rows as a plain table."""
        return self.grid.to_html()

    def _names(self, all_layers: bool) -> list[str]:
        frame = self._lab.layers()
        if all_layers:
            return list(frame["name"])
        has_quantizer = frame["weight_bits"].notna() | (frame["grid"] == frame["name"])
        return list(frame.loc[has_quantizer, "name"])

    def _edit(self, rows: list[str], column: str, value: Scalar) -> None:
        part, _, setting = column.partition("_")
        try:
            self._lab.set(rows, part, **{setting: value})
        except Busy as error:
            raise ValueError(str(error)) from error

    def _patch(self, names: Iterable[str]) -> None:
        changes: dict[str, dict[str, Scalar]] = {column.name: {} for column in _COLUMNS[2:]}
        noise = self._lab.noise
        for name in names:
            if name in self._shown:
                for column, value in _Cells.of(self._lab.layer_row(name), noise.get(name)).values.items():
                    if column in changes:
                        changes[column][name] = value
        self.grid.patch(changes)

    def _patch_noise(self, names: Iterable[str]) -> None:
        noise = self._lab.noise
        self.grid.patch({"noise": {name: noise.get(name) for name in names if name in self._shown}})

    def _grid_selected(self, change: Any) -> None:
        if tuple(change["new"]) != self._lab.selected:
            self._lab.select(change["new"])

    def _lab_selected(self, names: tuple[str, ...]) -> None:
        shown = [name for name in names if name in self._shown]
        if shown != self.grid.selected:
            self.grid.selected = shown
