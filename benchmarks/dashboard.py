"""The dashboard of 300 layers, measured in a real JupyterLab: time to be there, echo of an edit, traffic, leaks.

    python -m benchmarks.dashboard [--edits 1000] [--busy]

Run from the repository; needs Chromium. Times are medians, taken in the page from the key to the painted answer.
Beside each stands the processor time that the kernel and the page spent on it, which other work on the machine
hardly changes. --busy: another process keeps a core busy meanwhile.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Page, sync_playwright

from tests.browser.conftest import CHROMIUM_ARGUMENTS, Notebook, new_notebook, running_jupyterlab
from tests.conftest import find_chromium

SETUP = """
import torch, qlab
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
blocks = [layer for _ in range(150) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
model = nn.Sequential(*blocks).eval()
batches = [torch.randn(4, 8, 8, 8)]
sim = qlab.QuantSim(model, batches[0], qlab.presets.w8a8())
sim.calibrate(batches)
lab = qlab.Lab(sim, batches)
lab.select("0")
import qlab.views
"""
EDITS = """
names = [n for n in lab.layers().loc[lambda f: f['weight_bits'].notna(), 'name']]
for i in range({count}):
    lab.set(names[i % len(names)], 'weight', bits=3 + (i + {turn}) % 6)
lab.measure().result()
"""
COUNTS = """
import gc, os
from ipywidgets.widgets.widget import _instances
gc.collect()
pages = int(open('/proc/self/statm').read().split()[1])
listeners = sum(len(getattr(lab.events, name)) for name in lab.events.guards)
print(pages * os.sysconf('SC_PAGE_SIZE'), listeners, len(_instances), lab.step)
"""
UNTIL_THERE = """async () => {
    const began = performance.now();
    window.jupyterapp.commands.execute('notebook:run-cell');
    const there = () => document.querySelectorAll('.qlab-grid tbody tr').length;
    let table = 0;
    while (!document.querySelector('.qlab-pane[data-ready]') || !table) {
        if (!table && there()) table = performance.now() - began;
        await new Promise(requestAnimationFrame);
    }
    return [table, performance.now() - began];
}"""
ECHO = """async ([row, digit]) => {
    const cell = document.querySelectorAll('.qlab-grid tbody tr')[row].cells[2];
    const text = () => document.querySelector('.qlab-layers [role=status] b').parentElement.textContent;
    const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    cell.focus();
    cell.click();
    const name = document.querySelectorAll('.qlab-grid tbody tr')[row].dataset.row;
    while (!text().startsWith(`${name} weight`)) await painted();
    await new Promise((resolve) => setTimeout(resolve, 1000)); // the measurement of the edit before is over
    const began = performance.now();
    cell.dispatchEvent(new KeyboardEvent('keydown', { key: digit, bubbles: true, cancelable: true }));
    let table = 0, histogram = 0;
    while ((!table || !histogram) && performance.now() - began < 5000) {
        await painted();
        if (!table && cell.textContent === digit && !cell.classList.contains('qlab-pending')) {
            table = performance.now() - began;
        }
        if (!histogram && text().includes(`: ${digit} bits`)) histogram = performance.now() - began;
    }
    return [table, histogram];
}"""
SORT_AND_FILTER = """async () => {
    const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    const timed = async (action) => {
        await painted();
        const began = performance.now();
        action();
        await painted();
        return performance.now() - began;
    };
    const search = document.querySelector('.qlab-grid input[type=search]');
    const typed = (text) => () => {
        search.value = text;
        search.dispatchEvent(new Event('input', { bubbles: true }));
    };
    const sort = await timed(() => document.querySelectorAll('.qlab-grid thead tr:last-child button')[5].click());
    const filter = await timed(typed('1?'));
    await timed(typed(''));
    return [sort, filter];
}"""


class Work:
    """Processor time of the kernel and of the page's main thread, between calls of `spent`."""

    def __init__(self, notebook: Notebook) -> None:
        self._notebook = notebook
        self._session = notebook.page.context.new_cdp_session(notebook.page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self._before = self._now()

    def spent(self, times: int = 1) -> str:
        """What was spent since the last call, for one of so many times."""
        before, self._before = self._before, self._now()
        kernel, page = (1000 * (now - then) / times for now, then in zip(self._before, before, strict=True))
        return f"processor: kernel {kernel:.0f} ms, page {page:.0f} ms"

    def _now(self) -> tuple[float, float]:
        metrics = {entry["name"]: entry["value"] for entry in self._session.send("Performance.getMetrics")["metrics"]}
        return float(self._notebook.py("import time; print(time.process_time())")), metrics["TaskDuration"]


@contextlib.contextmanager
def a_busy_core() -> Iterator[None]:
    """Another process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def browser_counts(page: Page, session: CDPSession) -> tuple[float, int]:
    """Megabytes of JavaScript's heap, and event listeners, after collecting garbage."""
    for _ in range(3):
        session.send("HeapProfiler.collectGarbage")
        page.wait_for_timeout(300)
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    return metrics["JSHeapUsedSize"] / 1e6, int(metrics["JSEventListeners"])


def kernel_counts(notebook: Notebook) -> tuple[float, int, int, int]:
    """Megabytes of the kernel, listeners of the lab's events, widgets open, steps of the history."""
    memory, listeners, widgets, steps = notebook.py(COUNTS).split()
    return int(memory) / 1e6, int(listeners), int(widgets), int(steps)


def edit(notebook: Notebook, turns: range) -> None:
    """Edits 100 layers a turn, one after the other, as cells do, and waits until all is measured and painted."""
    for turn in turns:
        notebook.py(EDITS.format(count=100, turn=turn))
        notebook.page.wait_for_timeout(500)
    notebook.page.wait_for_timeout(2000)


def measure(notebook: Notebook, edits: int) -> None:
    """Prints all figures of one notebook whose only cell shows the dashboard."""
    page, received = notebook.page, [0]

    def count(payload: Any) -> None:
        received[0] += len(payload)

    page.on("websocket", lambda socket: socket.on("framereceived", count))
    page.reload()
    notebook.idle()
    notebook.py(SETUP)
    page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0")
    work = Work(notebook)
    received[0] = 0
    table, all_there = page.evaluate(UNTIL_THERE)
    spent = work.spent()
    page.wait_for_timeout(3000)
    rows = page.locator(".qlab-grid tbody tr").count()
    print(f"{rows} rows: table after {table:.0f} ms, with its histogram after {all_there:.0f} ms (aim 2000); {spent}")
    print(f"sent to the browser at start, BokehJS included: {received[0] / 1e6:.2f} MB (aim 2)")
    notebook.py("lab.measure().result()")
    work.spent()
    echoes = [page.evaluate(ECHO, [2 * i + 1, str(3 + i % 5)]) for i in range(20)]
    print(f"an edit with all that follows, scores and noise of 300 layers included; {work.spent(len(echoes))}")
    for what, index in (("table", 0), ("histogram", 1)):
        times = sorted(echo[index] for echo in echoes if echo[index])
        nineties = times[int(0.9 * (len(times) - 1))]
        print(f"edit echoed in the {what}: {statistics.median(times):.0f} ms, 90 % in {nineties:.0f} ms (aim 150)")
    found = [page.evaluate(SORT_AND_FILTER) for _ in range(5)]
    sort, filter_ = (statistics.median(times) for times in zip(*found, strict=True))
    print(f"sort {sort:.0f} ms, filter {filter_:.0f} ms (aim 100); {work.spent(len(found))}")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    edit(notebook, range(1))  # caches fill
    heap, page_listeners = browser_counts(page, session)
    memory, listeners, widgets, steps = kernel_counts(notebook)
    edit(notebook, range(1, 1 + edits // 100))
    heap_after, page_listeners_after = browser_counts(page, session)
    memory_after, listeners_after, widgets_after, steps_after = kernel_counts(notebook)
    print(f"after {steps_after - steps} edits more:")
    print(f"  page: heap {heap:.1f} -> {heap_after:.1f} MB ({heap_after / heap - 1:+.1%})")
    print(f"  page: listeners {page_listeners} -> {page_listeners_after}")
    print(f"  kernel: {memory:.0f} -> {memory_after:.0f} MB ({memory_after / memory - 1:+.1%}), the history in it")
    print(f"  kernel: listeners {listeners} -> {listeners_after}, widgets {widgets} -> {widgets_after}")


def main() -> None:
    """Starts JupyterLab and Chromium, and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    beside = a_busy_core() if arguments.busy else contextlib.nullcontext()
    with (
        beside,
        tempfile.TemporaryDirectory() as folder,
        running_jupyterlab(Path(folder)) as server,
        sync_playwright() as p,
    ):
        browser = p.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)
        measure(new_notebook(browser, server, ["lab"]), arguments.edits)
        browser.close()


if __name__ == "__main__":
    main()
