"""Everything below the views works where ipywidgets, anywidget and Bokeh are not installed."""

import subprocess
import sys

IMPORT_WITHOUT_WIDGETS = """
import importlib, pkgutil, sys

for absent in ("ipywidgets", "anywidget", "bokeh"):
    sys.modules[absent] = None  # import raises ModuleNotFoundError

import qlab

modules = [
    module.name
    for package in ("quantization", "graph", "sim", "export", "analysis", "techniques", "lab", "examples")
    for module in pkgutil.walk_packages([f"{qlab.__path__[0]}/{package}"], f"qlab.{package}.")
]
for name in modules:
    importlib.import_module(name)
print(*sorted(name for name, module in sys.modules.items() if module is not None))
"""


def test_importing_all_below_the_views_needs_neither_widgets_nor_bokeh_nor_sklearn():
    run = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_WIDGETS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    imported = run.stdout.split()
    assert "qlab" in imported
    assert "sklearn" not in imported
