"""Widgets without a browser: what they send is recorded, what a browser would send is handed in."""

import itertools
from collections.abc import Callable
from typing import Any

import ipywidgets
import pytest


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[bytes]]]:
    """The custom messages of all widgets: (message, buffers)."""
    messages: list[tuple[dict[str, Any], list[bytes]]] = []

    def record(widget: ipywidgets.Widget, content: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        messages.append((content, buffers or []))

    monkeypatch.setattr(ipywidgets.Widget, "send", record)
    return messages


@pytest.fixture
def from_browser() -> Callable[[ipywidgets.Widget, dict[str, Any]], None]:
    """Hand a custom message to a widget as its comm would, in turn unless the message has a turn of its own."""
    turns = itertools.count()

    def hand_in(widget: ipywidgets.Widget, content: dict[str, Any]) -> None:
        turn = content.get("turn") or ("a browser", next(turns))
        data = {"method": "custom", "content": {**content, "turn": turn}}
        widget.comm.handle_msg({"content": {"data": data}, "buffers": []})

    return hand_in
