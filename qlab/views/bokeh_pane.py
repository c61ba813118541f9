"""Live Bokeh in a notebook, offline: a document kept the same in Python and in every view of it.

BokehJS reaches the browser over the widget's own comm, once per kernel; changes travel both ways in Bokeh's
PATCH-DOC protocol. The calls into Bokeh that are not its public interface are all in this file and in
bokeh_pane.js; tests/browser covers them.
"""

import base64
import contextlib
import functools
import gzip
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import bokeh
import traitlets
from anywidget import AnyWidget
from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.document.events import ColumnDataChangedEvent, ColumnsStreamedEvent, DocumentPatchedEvent
from bokeh.model import Model
from bokeh.protocol.messages.patch_doc import patch_doc
from ipywidgets import Widget, widget_serialization

from qlab.views.live_widget import LiveWidget
from qlab.views.view import STATIC_NOTE, escape


class BokehPane(LiveWidget):
    """Shows a Bokeh figure, layout or document, and keeps it the same on both sides.

    Python changes the models as usual and the browser follows; selections, taps and other Bokeh events arrive at
    the usual `on_change` and `on_event` callbacks, once each. `label` is read out by screen readers, which see
    nothing of a canvas: put the headline number into it. `fallback` returns HTML or SVG for readers without a kernel.

    Raises ValueError if the figure belongs to a document with other roots, or holds Bokeh's input widgets, whose
    code is not sent: use ipywidgets for those.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    label = traitlets.Unicode().tag(sync=True)
    _bokehjs = traitlets.Instance(Widget).tag(sync=True, **widget_serialization)

    def __init__(
        self,
        figure: Model | Document,
        *,
        label: str = "",
        fallback: Callable[[], str] | None = None,
        **traits: Any,
    ) -> None:
        self.document = _document_of(figure)
        self.fallback = fallback
        self._release_callbacks: list[Callable[[], object]] = []
        self._batched: list[DocumentPatchedEvent] = []
        self._batch_depth = 0
        self._bookkeeping = threading.Lock()  # never held while code of others runs
        super().__init__(label=label, _bokehjs=BokehJS.of_this_kernel(), **traits)
        self.document.on_change_dispatch_to(self)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Send all changes made inside as one message, painted once; batches nest.

        Changes that other threads make meanwhile join the batch.
        """
        with self._bookkeeping:
            self._batch_depth += 1
        try:
            yield
        finally:
            with self._bookkeeping:
                self._batch_depth -= 1
                events = [] if self._batch_depth else self._batched
                if not self._batch_depth:
                    self._batched = []
            if events:
                self._send_patch(events)

    def on_release(self, callback: Callable[[], object]) -> Callable[[], object]:
        """Call back when a press that began in the pane ends, after all that it changed has arrived."""
        self._release_callbacks.append(callback)
        return callback

    def take_snapshot(self) -> str:
        return serialize_json(self.document.to_json(deferred=False))

    def receive(self, message: dict[str, Any]) -> None:
        if message["kind"] == "patch":
            self.alert = ""
            if any(event["kind"] != "MessageSent" for event in message["patch"]["events"]):
                self.changed()
            self.document.apply_json_patch(message["patch"], setter=self)
        elif message["kind"] == "released":
            for callback in self._release_callbacks:
                callback()
        elif message["kind"] == "resync":
            self.send({"kind": "document", "document": self.take_snapshot()})

    def summary(self) -> str:
        return f"BokehPane({self.label!r})"

    def to_html(self) -> str:
        picture = self.fallback() if self.fallback is not None else ""
        if picture.lstrip().startswith("<svg"):  # JupyterLab strips these from untrusted notebooks, images it keeps
            data = base64.b64encode(picture.encode()).decode()
            picture = f'<img alt="{escape(self.label)}" src="data:image/svg+xml;base64,{data}">'
        caption = f"<figcaption>{escape(self.label)}</figcaption>" if self.label else ""
        return f'<figure style="margin: 0">{picture}{caption}</figure>{STATIC_NOTE}'

    def close(self) -> None:
        if self.comm is not None:
            self.document.callbacks.remove_on_change(self)
        super().close()

    def _document_patched(self, event: DocumentPatchedEvent) -> None:
        if event.setter is self:  # it came from the browser
            return
        with self._bookkeeping:
            if self._batch_depth:
                self._join_batch(event)
                return
        self._send_patch([event])

    def _join_batch(self, event: DocumentPatchedEvent) -> None:
        if isinstance(event, ColumnsStreamedEvent):
            # An earlier event of this batch may carry the same source, and it is serialised only at the end, with the
            # new rows in it; streaming these as well would show them twice. Whole columns do no harm.
            event = ColumnDataChangedEvent(event.document, event.model, event.attr)
        if not any(earlier.combine(event) for earlier in reversed(self._batched)):
            self._batched.append(event)

    def _send_patch(self, events: list[DocumentPatchedEvent]) -> None:
        self.changed()
        message = patch_doc.create(events)
        self.send(
            {
                "kind": "patch",
                "patch": serialize_json(message.content),
                "buffers": [buffer.id for buffer in message.buffers],
            },
            [buffer.to_bytes() for buffer in message.buffers],
        )


class BokehJS(Widget):
    """Carries BokehJS, gzipped (0.35 MB), to the browser; every pane of a kernel points at the same one.

    To the browser it is an anywidget without a view; a plain Widget has no layout to send along.
    """

    _model_name = traitlets.Unicode("AnyModel").tag(sync=True)
    _model_module = traitlets.Unicode("anywidget").tag(sync=True)
    _model_module_version = traitlets.Unicode(AnyWidget._model_module_version.default_value).tag(sync=True)
    _esm = traitlets.Unicode("export default {}").tag(sync=True)
    _anywidget_id = traitlets.Unicode("qlab.BokehJS").tag(sync=True)
    version = traitlets.Unicode(bokeh.__version__).tag(sync=True)
    code = traitlets.Bytes().tag(sync=True)

    _instance: ClassVar["BokehJS | None"] = None

    @classmethod
    def of_this_kernel(cls) -> "BokehJS":
        if cls._instance is None or cls._instance.comm is None:
            cls._instance = cls(code=_compressed_bokehjs())
        return cls._instance


@functools.cache
def _compressed_bokehjs() -> bytes:
    code = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return gzip.compress(code.read_bytes(), compresslevel=5, mtime=0)  # 9 takes twice as long for 1 % less


def _document_of(figure: Model | Document) -> Document:
    if isinstance(figure, Document):
        document = figure
    elif figure.document is None:
        document = Document()
        document.add_root(figure)
    elif figure.document.roots == [figure]:
        document = figure.document
    else:
        raise ValueError(
            f"expected a figure of its own, got {figure}, which belongs to a document with "
            f"{len(figure.document.roots)} roots. Pass that document to show all of it."
        )
    inputs = sorted({type(model).__name__ for model in document.models if ".widgets" in type(model).__module__})
    if inputs:
        raise ValueError(f"expected plots, got Bokeh widgets ({', '.join(inputs)}). Put ipywidgets beside the pane.")
    return document
