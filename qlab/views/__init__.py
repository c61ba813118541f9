"""Widgets on a Lab; the only package that imports ipywidgets and anywidget."""
