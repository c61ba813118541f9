"""On PYTHONPATH, this makes a Python process find neither Bokeh nor widgets, as if they were not installed."""

import sys

ABSENT = ("anywidget", "bokeh", "ipywidgets")


class Absent:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent)
