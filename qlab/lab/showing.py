"""Where a lab can be shown as widgets, and what to say where it cannot."""

import sys
from importlib import import_module
from typing import Any

EXTRA = 'pip install "qlab[lab]"'


def module_of_views() -> Any:
    """`qlab.views` where a kernel runs and widgets are installed, else None; the lab works without any view."""
    return _found()[0]


def missing_note() -> str:
    """What to install so that a lab shows as a dashboard; empty where nothing is missing, or no kernel runs."""
    return _found()[1]


def _found() -> tuple[Any, str]:
    ipython = sys.modules.get("IPython")
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return None, ""
    try:
        return import_module("qlab.views"), ""  # by name: views stand above the lab
    except ImportError as error:
        return None, f"Widgets are not installed ({error}); for the live dashboard: {EXTRA}"
