"""A form made from declared settings: one field a setting, with its range, unit and help; see `qlab.settings`."""

from typing import Any

import ipywidgets

from qlab.settings import Declaration, describe
from qlab.views.view import escape


class SettingsForm(ipywidgets.VBox):
    """The declared settings of a dataclass as fields. `make()` builds it from what was typed.

    Fields take anything: what the declaration refuses is refused by the dataclass itself, in its own words.
    """

    def __init__(self, owner: type) -> None:
        self.owner = owner
        self.fields: dict[str, ipywidgets.Widget] = {}
        self._declared = {told.name: told for told in describe(owner) if told.kind != "hidden"}
        rows = []
        for told in self._declared.values():
            field = self.fields[told.name] = _field(told)
            help_text = ipywidgets.HTML(f"{escape(told.help)} <span class='qlab-quiet'>{escape(_range(told))}</span>")
            row = ipywidgets.HBox(
                [field, help_text],
                layout=ipywidgets.Layout(align_items="center", grid_gap="0 10px"),
            )
            rows.append(row)
        nothing = [] if rows else [ipywidgets.HTML("<span class='qlab-quiet'>It has no settings.</span>")]
        super().__init__(children=rows + nothing)

    def make(self) -> Any:
        """The dataclass with the settings typed; raises SettingError for the first that is out of range."""
        return self.owner(**{name: _value(told, self.fields[name]) for name, told in self._declared.items()})


def _field(told: Declaration) -> ipywidgets.Widget:
    layout = ipywidgets.Layout(width="290px", flex="0 0 auto")
    style = {"description_width": "140px"}
    shared: dict[str, Any] = {
        "description": told.name.replace("_", " "),
        "layout": layout,
        "style": style,
        "tooltip": told.help,
    }
    if told.kind == "bool":
        return ipywidgets.Checkbox(value=bool(told.default), indent=True, **shared)
    if told.kind == "choice":
        labels = ["none" if choice is None else str(choice) for choice in told.choices]
        return ipywidgets.Dropdown(options=labels, index=told.choices.index(told.default), **shared)
    return ipywidgets.Text(value=_text(told.default), placeholder="none" if told.optional else "", **shared)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _value(told: Declaration, field: ipywidgets.Widget) -> Any:
    """What was typed as the setting takes it; what cannot be read is handed on, and refused with the rest."""
    if told.kind == "choice":
        return told.choices[field.index]
    if told.kind == "bool":
        return field.value
    text = field.value.strip()
    if not text and told.optional:
        return None
    if told.kind == "text":
        several = isinstance(told.default, list | tuple)
        return tuple(part.strip() for part in text.split(",") if part.strip()) if several else text
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if told.kind == "int" and number.is_integer() else number


def _range(told: Declaration) -> str:
    low, high, unit = told.minimum, told.maximum, f" {told.unit}" if told.unit else ""
    if low is not None and high is not None:
        return f"({_number(low)} to {_number(high)}{unit})"
    if low is not None:
        return f"(at least {_number(low)}{unit})"
    if high is not None:
        return f"(at most {_number(high)}{unit})"
    return f"({told.unit})" if told.unit else ""


def _number(value: float) -> str:
    """A bound for reading.

    >>> _number(1000000), _number(1e-06), _number(0.5)
    ('1,000,000', '1e-06', '0.5')
    """
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"
