"""Views end their subscriptions, show errors escaped, and raise them only when strict."""

import subprocess
from pathlib import Path
from shutil import copy, which

import ipywidgets
import pytest
from psygnal import Signal

import qlab.views
from qlab.errors import Busy
from qlab.views.view import View, escape

SCRIPTS = sorted(Path(qlab.views.__file__).parent.glob("*.js"))


class Subject:
    changed = Signal(str)


class Echo(View):
    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.seen: list[str] = []
        self.button = ipywidgets.Button()
        self.display(ipywidgets.HBox([self.button]))
        self.listen(subject.changed, self.show)

    def show(self, text: str) -> None:
        if text.startswith("bad"):
            raise ValueError(f"cannot show <{text}>")
        self.seen.append(text)


class Drawing(View):
    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.drawn = 0
        self.meanwhile = None
        self.redraw_on(subject.changed)

    def redraw(self) -> None:
        self.drawn += 1
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()


def _refuse() -> None:
    raise Busy("something runs")


@pytest.fixture
def subject() -> Subject:
    return Subject()


def test_a_closed_view_hears_nothing_and_leaves_no_widget_open(subject):
    view = Echo(subject)
    subject.changed.emit("one")
    view.close()
    view.close()
    subject.changed.emit("two")
    assert view.seen == ["one"]
    assert len(subject.changed) == 0
    assert view.comm is None
    assert view.button.comm is None
    assert view.frame.comm is None


def test_an_error_is_shown_until_the_same_callback_succeeds(subject, monkeypatch):
    monkeypatch.delenv("QLAB_STRICT", raising=False)
    view = Echo(subject)
    subject.changed.emit("bad<b>")
    assert view.frame.text.startswith("ValueError: cannot show <bad<b>>")
    assert "Traceback" in view.frame.text
    assert isinstance(view.frame.error, ValueError)
    view.guarded(lambda: None)()
    assert view.frame.error is not None
    subject.changed.emit("good")
    assert view.frame.text == ""


def test_a_refusal_says_its_sentence_without_a_traceback(subject, monkeypatch):
    monkeypatch.delenv("QLAB_STRICT", raising=False)
    view = Echo(subject)
    view.guarded(_refuse)()
    assert view.frame.text == "Busy: something runs\n"


def test_strict_raises_what_it_shows(subject, monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    view = Echo(subject)
    with pytest.raises(Exception, match="cannot show <bad>") as caught:
        subject.changed.emit("bad")
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)
    assert view.frame.error is not None


def test_a_hidden_view_draws_once_when_it_is_shown_again(subject):
    view = Drawing(subject)
    subject.changed.emit("one")
    view.is_shown = False
    subject.changed.emit("two")
    subject.changed.emit("three")
    assert view.drawn == 1
    view.is_shown = True
    assert view.drawn == 2
    view.is_shown = True
    assert view.drawn == 2


def test_a_change_while_drawing_is_drawn_afterwards_by_the_same_thread(subject):
    view = Drawing(subject)
    view.meanwhile = lambda: subject.changed.emit("again")
    subject.changed.emit("one")
    assert view.drawn == 2


def test_hiding_reaches_the_views_within(subject):
    outer, inner = Echo(subject), Drawing(subject)
    outer.display(ipywidgets.HBox([inner]))
    outer.is_shown = False
    subject.changed.emit("one")
    assert inner.drawn == 0
    outer.is_shown = True
    assert inner.drawn == 1


def test_a_view_reads_without_a_kernel(subject):
    data, _ = Echo(subject)._repr_mimebundle_()
    assert data["text/plain"] == "Echo(Subject)"
    assert "Echo(Subject)" in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_escape_leaves_no_markup():
    assert escape('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"


@pytest.mark.skipif(which("node") is None, reason="no node to check JavaScript with")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_modules(script, tmp_path):
    module = tmp_path / f"{script.stem}.mjs"
    copy(script, module)
    check = subprocess.run(["node", "--check", module], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_there_are_scripts_to_check():
    assert {"bokeh_pane.js", "frame.js", "layer_grid.js"} <= {script.name for script in SCRIPTS}
