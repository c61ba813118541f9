"""Groups of layers: selected by a glob, by what they are or by their noise, and edited at once."""

import math
from collections.abc import Sequence
from typing import Any

import ipywidgets

from qlab.lab import Lab
from qlab.lab.rows import LayerRow
from qlab.quantization import RULE_NAMES, SCHEME_NAMES
from qlab.views.cell_editors import Scalar
from qlab.views.layer_table import BITS
from qlab.views.view import View, escape

SHARES = (0.1, 0.25, 0.5)
SETTINGS: dict[str, Sequence[tuple[str, Scalar]]] = {
    "bits": [(str(bits), bits) for bits in BITS],
    "enabled": [("on", True), ("off", False)],
    "granularity": [("per_tensor", "per_tensor"), ("per_channel", "per_channel")],
    "rule": [(name, name) for name in RULE_NAMES],
    "scheme": [(name, name) for name in SCHEME_NAMES],
    "frozen": [("range kept", True), ("range by rule", False)],
}


class SelectionBar(View):
    """Selects layers and changes one setting of all selected ones as one step."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._glob = ipywidgets.Text(
            placeholder="blocks.*", description="Select", continuous_update=False, tooltip="a name or a glob"
        )
        self._kind = ipywidgets.Dropdown(description="kind", options=self._kinds())
        self._noise = ipywidgets.Dropdown(description="noise", options=_noise_choices())
        self._part = ipywidgets.Dropdown(description="Set", options=("weight", "output"))
        self._setting = ipywidgets.Dropdown(options=list(SETTINGS), tooltip="setting of the selected layers")
        self._value = ipywidgets.Dropdown(options=SETTINGS["bits"], value=8, tooltip="value of the setting")
        self._apply = ipywidgets.Button(description="Apply", layout=ipywidgets.Layout(width="auto"))
        self._said = ipywidgets.HTML()
        for widget, label, width in (
            (self._glob, "42px", "146px"),
            (self._kind, "30px", "146px"),
            (self._noise, "36px", "142px"),
            (self._part, "22px", "106px"),
            (self._setting, "0", "98px"),
            (self._value, "0", "96px"),
        ):
            widget.style.description_width, widget.layout.width = label, width
        self._glob.observe(self.guarded(self._by_glob), "value")
        self._kind.observe(self.guarded(self._by_kind), "value")
        self._noise.observe(self.guarded(self._by_noise), "value")
        self._setting.observe(self.guarded(self._name_values), "value")
        self._apply.on_click(self.guarded(lambda _: self.set_all()))
        self.listen(lab.events.selected, lambda _: self._say(""))
        bar = ipywidgets.HBox(
            [self._glob, self._kind, self._noise, self._part, self._setting, self._value, self._apply, self._said],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.display(bar)

    def select_kind(self, kind: str) -> None:
        """Selects every layer of a kind: 'depthwise_conv', 'attention', ..."""
        self._lab.select([row.name for row in self._rows() if row.kind == kind])

    def select_noisiest(self, share: float) -> None:
        """Selects the share of layers with the least SQNR in the running model; a negative share, those with most."""
        noise = {row.name: self._lab.noise.get(row.name, math.nan) for row in self._rows()}
        measured = sorted((name for name, value in noise.items() if not math.isnan(value)), key=lambda n: noise[n])
        if not measured:
            raise ValueError("the noise of layers was not measured yet: wait for the scores, or lab.measure().result()")
        count = max(1, round(abs(share) * len(measured)))
        self._lab.select(measured[:count] if share > 0 else measured[-count:])

    def set_all(self) -> None:
        """Changes the chosen setting of every selected layer that has it, as one step."""
        part, setting, value = self._part.value, self._setting.value, self._value.value
        rows = [self._lab.layer_row(name) for name in self._lab.selected]
        names = [row.name for row in rows if _has(row, part)]
        if not names:
            raise ValueError(f"none of the {len(rows)} selected layers has a quantizer of its own for its {part}.")
        self._lab.set(names, part, **{setting: value})
        left_out = len(rows) - len(names)
        self._say(f"{left_out} of the selected layers have no {part} of their own." if left_out else "")

    def _by_glob(self, change: Any) -> None:
        if change["new"].strip():
            self._lab.select(change["new"].strip())

    def _by_kind(self, change: Any) -> None:
        if change["new"]:
            self.select_kind(change["new"])
            self._kind.index = 0  # so that it can be chosen again

    def _by_noise(self, change: Any) -> None:
        if change["new"]:
            self.select_noisiest(change["new"])
            self._noise.index = 0

    def _name_values(self, change: Any) -> None:
        self._value.options = SETTINGS[change["new"]]

    def _rows(self) -> list[LayerRow]:
        rows = [self._lab.layer_row(name) for name in self._lab.layers()["name"]]
        return [row for row in rows if _has(row, "weight") or _has(row, "output")]

    def _kinds(self) -> list[tuple[str, str]]:
        kinds = [row.kind for row in self._rows()]
        found = sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))
        return [("choose", ""), *((f"{kind} ({kinds.count(kind)})", kind) for kind in found)]

    def _say(self, sentence: str) -> None:
        self._said.value = f'<span class="qlab-quiet" role="status">{escape(sentence)}</span>'


def _has(row: LayerRow, part: str) -> bool:
    return row.weight_bits is not None if part == "weight" else row.grid == row.name


def _noise_choices() -> list[tuple[str, float]]:
    noisy = [(f"noisiest {share:.0%}", share) for share in SHARES]
    return [("choose", 0.0), *noisy, *((f"cleanest {share:.0%}", -share) for share in SHARES)]
