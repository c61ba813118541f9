"""What holds for every figure: its saved picture, its page, its names, its empty form."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from bokeh.models import Label

from qlab import plots


def svg_of(plot: plots.Plot) -> ElementTree.Element:
    return ElementTree.fromstring(plot.to_svg())


def test_every_public_figure_is_covered_by_these_tests(all_plots):
    figures = {name for name in plots.__all__ if name.endswith("Figure")}
    assert {type(plot).__name__ for plot in all_plots} == figures


def test_a_notebook_gets_one_line_of_text_and_a_small_picture(example):
    bundle = example(["conv1", "fc"])._repr_mimebundle_()
    assert "\n" not in bundle["text/plain"]
    assert bundle["text/plain"].startswith(type(example(["conv1", "fc"])).__name__)
    encoded = re.fullmatch(
        r'<img alt="[^"<>]*" style="[^"]*" src="data:image/svg\+xml;base64,([^"]+)">', bundle["text/html"]
    )
    assert encoded, "an <img> with a data URI is what JupyterLab keeps in an untrusted notebook"
    assert ElementTree.fromstring(base64.b64decode(encoded[1])).tag.endswith("svg")


def test_equal_data_gives_an_equal_saved_picture(example):
    assert example(["conv1", "fc"])._repr_mimebundle_() == example(["conv1", "fc"])._repr_mimebundle_()


def test_hostile_names_stay_text_in_the_saved_picture(example, hostile):
    bundle = example([hostile, "fc"])._repr_mimebundle_()
    assert "<img src=x" not in bundle["text/html"]
    picture = ElementTree.fromstring(base64.b64decode(re.search('base64,([^"]+)', bundle["text/html"])[1]))
    assert {element.tag.rpartition("}")[2] for element in picture.iter()} <= {
        "svg",
        "title",
        "text",
        "path",
        "g",
        "image",
        "clipPath",
    }


def test_tooltips_never_ask_for_unescaped_values(all_plots):
    tooltips = [
        tip for plot in all_plots for tool in plot.figure.toolbar.tools for tip in getattr(tool, "tooltips", [])
    ]
    assert tooltips
    assert not [template for _, template in tooltips if "safe" in template]


def test_names_that_look_like_tex_are_not_typeset(example):
    # BokehJS typesets plain strings between these signs, for which it would need MathJax
    figure = example(["$$x^2$$", "fc"]).figure
    labels = [text for axis in figure.axis for text in axis.major_label_overrides.values()]
    assert not [text for text in [figure.title.text, *labels] if isinstance(text, str) and "$$" in text]


def test_an_empty_frame_gives_an_empty_figure_with_a_sentence(empty_plot):
    words = " ".join(element.text or "" for element in svg_of(empty_plot).iter())
    assert re.search(r"[A-Z][^.]+\.", words), words
    columns = [len(column) for renderer in empty_plot.figure.renderers for column in renderer.data_source.data.values()]
    assert set(columns) <= {0}


def test_an_empty_figure_fills_in_place(empty_plot):
    figure, sources = empty_plot.figure, [renderer.data_source for renderer in empty_plot.figure.renderers]
    numbers = {"channel", "min", "max", "value", "score", "left", "right", "count", "sqnr", "before", "after"}
    numbers |= {"cost", "step", "loss", "low", "high"}
    words = {"layer": "conv1", "stage": "float", "parent": None, "verdict": "effective"}
    empty_plot.update(pd.DataFrame([words | dict.fromkeys(numbers, 1.0)]))
    assert empty_plot.figure is figure
    assert [renderer.data_source for renderer in figure.renderers] == sources, "live views hold on to the sources"
    assert max(len(column) for source in sources for column in source.data.values()) == 1
    assert not [label for label in figure.center if isinstance(label, Label) and label.visible]


def test_the_label_for_screen_readers_is_the_headline(example):
    plot = example(["conv1", "fc"])
    assert plot.headline
    assert plot.figure.html_attributes["aria-label"] == plot.headline


@pytest.mark.parametrize(
    ("name", "missing"),
    [("histogram", "'count'"), ("sensitivity", "'score'"), ("noise", "'sqnr'"), ("comparison", "'before', 'after'"),
     ("pareto", "'cost', 'score'"), ("training", "'step', 'loss'"), ("heat_map", "'channel', 'value'"),
     ("relative_ranges", "'channel', 'min', 'max'"), ("weight_ranges", "'channel', 'min', 'max'"),
     ("decision_tree", "'stage', 'parent', 'score', 'verdict'"), ("range_history", "'step', 'low', 'high'")],
)  # fmt: skip
def test_missing_columns_are_listed(name, missing):
    with pytest.raises(plots.WrongColumns, match=f"missing: .*{missing}.* The frame has 'layer', 'left', 'right'"):
        getattr(plots, name)(pd.DataFrame({"layer": ["a"], "left": [0], "right": [1]}))


def test_text_where_numbers_belong_is_said():
    with pytest.raises(plots.WrongColumns, match="numbers in column 'score'"):
        plots.sensitivity(pd.DataFrame({"layer": ["a"], "score": ["high"]}))


def test_what_is_no_table_is_refused():
    with pytest.raises(TypeError, match="DataFrame"):
        plots.noise([1.0, 2.0])


def big_plots() -> list[plots.Plot]:
    random = np.random.default_rng(0)
    names = [f"encoder.layer.{i}.attention.self.query_projection" for i in range(300)]
    many = {"step": range(20_000), "loss": random.random(20_000), "score": random.random(20_000)}
    many |= {"low": -random.random(20_000), "high": random.random(20_000), "clipped": random.random(20_000)}
    edges = np.linspace(-1, 1, 2049)
    bins = {"left": edges[:-1], "right": edges[1:], "count": random.integers(1, 99_999, 2048)}
    levels = pd.DataFrame({"value": np.linspace(-1, 1, 65_536), "count": random.integers(1, 99, 65_536)})
    cells = pd.MultiIndex.from_product([names[:60], range(1280)], names=["layer", "channel"]).to_frame(index=False)
    cells["value"] = cells["max"] = random.random(len(cells))
    cells["min"] = -cells["max"]
    tensor = cells.iloc[:4096].assign(channel=range(4096))
    widths = {"layer": np.repeat(names, 6), "bits": np.tile(range(3, 9), 300), "score": random.random(1800)}
    noise = {"layer": np.repeat(names, 2), "tensor": ["weight", "output"] * 300, "sqnr": random.random(600)}
    chain = pd.DataFrame({"source": names[:-1], "target": names[1:]})
    return [
        plots.histogram(pd.DataFrame(bins), levels=levels, clip=(-0.5, 0.5)),
        plots.weight_ranges(tensor, before=tensor),
        plots.relative_ranges(cells),
        plots.heat_map(cells),
        plots.sensitivity(pd.DataFrame(widths).assign(error=0.01)),
        plots.noise(pd.DataFrame(noise)),
        plots.comparison(pd.DataFrame({"layer": names, "before": random.random(300), "after": random.random(300)})),
        plots.pareto(pd.DataFrame({"cost": random.random(3000), "score": random.random(3000)})),
        plots.training(pd.DataFrame(many)),
        plots.range_history(pd.DataFrame(many)),
        plots.graph(pd.DataFrame({"layer": names, "value": random.random(300)}), chain),
    ]


def test_the_saved_picture_of_large_data_stays_small():
    sizes = {type(plot).__name__: len(plot._repr_mimebundle_()["text/html"]) for plot in big_plots()}
    assert max(sizes.values()) < 30_000, sizes
    assert sum(sizes.values()) / len(sizes) < 20_000, sizes
