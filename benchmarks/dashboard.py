"""The dashboard of 300 layers, measured in a real JupyterLab: time to be there, echo of an edit, traffic, leaks.

    python -m benchmarks.dashboard [--edits 1000] [--busy] [--keep]

Run from the repository; needs Chromium. Times are medians, taken in the page from the key to the painted answer.
Beside each stands the processor time that the kernel and the page spent on it, which other work on the machine
hardly changes. --busy: another process keeps a core busy meanwhile. The figures are printed, and kept in
benchmarks/results/dashboard.json in place of the earlier ones, those of a busy machine beside those of a quiet one,
which are in the table of all benchmarks. --keep: what was measured with qlab as it is now is not measured again.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Page, sync_playwright

from benchmarks import table
from benchmarks.measuring import exactly
from benchmarks.record import Record
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
    let shown = 0, table = 0, histogram = 0;
    while ((!table || !histogram) && performance.now() - began < 5000) {
        await painted();
        if (!shown && cell.textContent === digit) shown = performance.now() - began;
        if (!table && cell.textContent === digit && !cell.classList.contains('qlab-pending')) {
            table = performance.now() - began;
        }
        if (!histogram && text().includes(`: ${digit} bits`)) histogram = performance.now() - began;
    }
    return [shown, table, histogram];
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


@dataclass(frozen=True)
class Row:
    """One figure. at_most: what it should not exceed, None for what is only told."""

    name: str
    value: float
    unit: str
    at_most: float | None = None

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if self.unit in ("ms", "") else f"{self.value:.2f}"
        aim = "" if self.at_most is None else f" (at most {self.at_most:g})"
        return f"{self.name}: {value} {self.unit}".rstrip() + aim


class Work:
    """Processor time of the kernel and of the page's main thread, between calls of `spent`."""

    def __init__(self, notebook: Notebook) -> None:
        self._notebook = notebook
        self._session = notebook.page.context.new_cdp_session(notebook.page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self._before = self._now()

    def spent(self, times: int = 1) -> Callable[[str], Iterator["Row"]]:
        """What was spent since the last call, for one of so many times, as rows once it has a name."""
        before, self._before = self._before, self._now()
        both = [1000 * (now - then) / times for now, then in zip(self._before, before, strict=True)]

        def rows(what: str) -> Iterator[Row]:
            for where, spent in zip(("kernel", "page"), both, strict=True):
                yield Row(f"{what}: processor of the {where}", spent, "ms")

        return rows

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


def measure(notebook: Notebook, edits: int) -> Iterator[Row]:
    """All figures of one notebook whose only cell shows the dashboard."""
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
    table_ms, all_ms = page.evaluate(UNTIL_THERE)
    spent = work.spent()
    page.wait_for_timeout(3000)
    yield Row("rows of the table", page.locator(".qlab-grid tbody tr").count(), "")
    yield Row("table there after", table_ms, "ms")
    yield Row("dashboard there after", all_ms, "ms", 2000)
    yield from spent("start")
    yield Row("sent to the browser at start, BokehJS included", received[0] / 1e6, "MB", 2)
    notebook.py("lab.measure().result()")
    work.spent()
    echoes = [page.evaluate(ECHO, [2 * i + 1, str(3 + i % 5)]) for i in range(20)]
    spent = work.spent(len(echoes))
    for what, index, limit in (
        ("shown in the table", 0, 50),
        ("confirmed in the table", 1, 150),
        ("echoed in the histogram", 2, 150),
    ):
        times = sorted(echo[index] for echo in echoes if echo[index])
        yield Row(f"edit {what}", statistics.median(times), "ms", limit)
        yield Row(f"edit {what}, 90 % in", times[int(0.9 * (len(times) - 1))], "ms")
    yield from spent("an edit with all that follows, scores and noise of all layers included")
    found = [page.evaluate(SORT_AND_FILTER) for _ in range(5)]
    spent = work.spent(len(found))
    for what, times in zip(("sort", "filter"), zip(*found, strict=True), strict=True):
        yield Row(what, statistics.median(times), "ms", 100)
    yield from spent("sort and filter")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    edit(notebook, range(1))  # caches fill
    heap, page_listeners = browser_counts(page, session)
    memory, listeners, widgets, steps = kernel_counts(notebook)
    edit(notebook, range(1, 1 + edits // 100))
    heap_after, page_listeners_after = browser_counts(page, session)
    memory_after, listeners_after, widgets_after, steps_after = kernel_counts(notebook)
    yield Row("edits in a row", steps_after - steps, "")
    yield Row("page: heap after them", heap_after, "MB")
    yield Row("page: growth of the heap", 100 * (heap_after / heap - 1), "%", 10)
    yield Row("page: more listeners", page_listeners_after - page_listeners, "", 0)
    yield Row("kernel: memory after them", memory_after, "MB")
    yield Row("kernel: growth of its memory, the history in it", 100 * (memory_after / memory - 1), "%", 10)
    yield Row("kernel: more listeners", listeners_after - listeners, "", 0)
    yield Row("kernel: more widgets", widgets_after - widgets, "", 0)


def main() -> None:
    """Starts JupyterLab and Chromium, and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    for flag in ("--busy", "--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    record = Record("dashboard", again=arguments.again or not arguments.keep or arguments.busy)
    if not record.lacks("dashboard", 1, "in the page"):
        return
    beside = a_busy_core() if arguments.busy else contextlib.nullcontext()
    with (
        beside,
        tempfile.TemporaryDirectory() as folder,
        running_jupyterlab(Path(folder)) as server,
        sync_playwright() as p,
    ):
        browser = p.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)
        rows = []
        for row in measure(new_notebook(browser, server, ["lab"]), arguments.edits):
            print(row, flush=True)
            rows.append(asdict(row))
        browser.close()
    record.found["busy" if arguments.busy else "quiet"] = {"rows": rows, "machine": table.machine()}
    if arguments.busy:
        record.write()
    else:
        told = [row for row in rows if row["unit"] in ("ms", "MB") and ":" not in row["name"]]
        shown = {f"{row['name']}, {row['unit']}": exactly(row["value"]) for row in told}
        record.add("dashboard", 1, "in the page", shown)


if __name__ == "__main__":
    main()
