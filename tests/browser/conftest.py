"""A real JupyterLab in a real Chromium, cut off from the network: what a person sees and does, as tests.

`open_notebook(cells)` opens a notebook and runs it; one per module shares a kernel, whose start takes most of the
time. A test fails on any error in the page and on any request that leaves the machine.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import nbformat
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, Route, expect, sync_playwright

REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = REPOSITORY / "artifacts" / "screenshots"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
Found = TypeVar("Found")
PATIENCE_S = 30  # for what takes a moment on an idle machine and several seconds on a busy one
expect.set_options(timeout=1000 * PATIENCE_S)
SESSION = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session"


@dataclass(frozen=True)
class Frontend:
    """What shows notebooks. module: `python -m` starts it. path: of a notebook. alive: a page that answers at once.

    own: what is its own doing, with an empty notebook too: errors of the page, addresses that requests begin with.
    """

    module: str
    options: tuple[str, ...]
    path: str
    alive: str = "/api"
    own: tuple[str, ...] = ()


SERVER_OPTIONS = ("--ServerApp.port_retries=0", "--ServerApp.root_dir={notebooks}", "--IdentityProvider.token={token}")
JUPYTERLAB = Frontend("jupyterlab", (*SERVER_OPTIONS, "--LabApp.expose_app_in_browser=True"), "lab/tree")
NOTEBOOK_7 = Frontend(
    "notebook",
    (*SERVER_OPTIONS, "--JupyterNotebookApp.expose_app_in_browser=True"),
    "notebooks",
    own=("Cannot read properties of undefined (reading 'schema')",),
)
VOILA = Frontend(
    "voila",
    ("--Voila.root_dir={notebooks}", "--token={token}"),
    "voila/render",
    alive="/",
    own=("https://cdn.jsdelivr.net/npm/@fortawesome/",),  # icons; without them it shows the same
)


@dataclass(frozen=True)
class Server:
    """A server of our own: its settings, kernels and files are in a temporary folder."""

    url: str
    token: str
    notebooks: Path
    frontend: Frontend = JUPYTERLAB

    def address(self, name: str) -> str:
        """Where a notebook is opened."""
        return f"{self.url}/{self.frontend.path}/{name}?reset&token={self.token}"

    def request(self, path: str, method: str = "GET") -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, None, headers, method=method)) as reply:
            return reply.read()


@dataclass
class Notebook:
    """A notebook open in the browser; `page` is Playwright's."""

    page: Page
    server: Server
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def command(self, name: str, **arguments: object) -> None:
        """Execute a JupyterLab command and wait until it is done."""
        script = "async ([name, args]) => { await window.jupyterapp.commands.execute(name, args) }"
        self.page.evaluate(script, [name, arguments])

    def idle(self) -> None:
        self.page.wait_for_function(f"{SESSION}?.kernel?.status === 'idle'", timeout=60_000)

    def run(self, code: str) -> Locator:
        """Append a cell, run it to its end and return its output area."""
        index = self.page.evaluate(
            """source => {
                const { content } = window.jupyterapp.shell.currentWidget;
                content.model.sharedModel.addCell({ cell_type: 'code', source });
                content.activeCellIndex = content.model.cells.length - 1;
                return content.activeCellIndex;
            }""",
            code,
        )
        self.command("notebook:run-cell")
        output = self.output(index)
        output.scroll_into_view_if_needed()
        return output

    def output(self, index: int) -> Locator:
        return self.page.locator(f".jp-Cell[data-windowed-list-index='{index}'] .jp-Cell-outputArea")

    def py(self, code: str) -> str:
        """Execute code in the kernel, outside any cell, and return what it printed."""
        printed, error = self.page.evaluate(
            f"""async code => {{
                let printed = '', error = '';
                const future = {SESSION}.kernel.requestExecute({{ code, store_history: false }});
                future.onIOPub = ({{ header, content }}) => {{
                    if (header.msg_type === 'stream') printed += content.text;
                    if (header.msg_type === 'error') error = content.traceback.join('\\n');
                }};
                await future.done;
                return [printed, error];
            }}""",
            code,
        )
        assert not error, error
        return printed.strip()

    def eventually(self, code: str, printed: str) -> None:
        """Wait until the code prints this: what the page sends needs a moment to arrive."""
        last = wait_until(self.page, lambda: self.py(code), lambda found: found == printed)
        assert last == printed, code

    def theme(self, name: str) -> None:
        """Switch to "Light" or "Dark", and wait until JupyterLab has taken its splash screen away.

        It does so 200 ms later, without asking whether an earlier change of theme did it already: of two changes within
        that time the second ends in an error of the page.
        """
        self.command("apputils:change-theme", theme=f"JupyterLab {name}")
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(name == 'Light').lower()}'")
        self.page.wait_for_function("!document.getElementById('jupyterlab-splash')")

    def reload(self) -> None:
        """Save, then load the page again; the kernel keeps running."""
        self.command("docmanager:save")
        self.page.reload()
        self.idle()

    def screenshot(self, name: str, of: Locator | None = None) -> None:
        """Write artifacts/screenshots/NAME.png, of one element or the whole window."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (of or self.page).screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")

    def complain(self) -> None:
        """Fail on what went wrong in the page since the last time, whatever else was tested."""
        outside, errors = self.outside[:], self.errors[:]
        self.outside.clear()
        self.errors.clear()
        assert not outside, f"requests left the machine: {outside[:3]}"
        assert not errors, f"errors in the page: {errors[:3]}"


def wait_until(page: Page, look: Callable[[], Found], is_it: Callable[[Found], bool]) -> Found:
    """Look again and again until this is it; returns what was seen last, for the caller to assert on."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_it(found := look()) and time.monotonic() < deadline:
        page.wait_for_timeout(40)
    return found


measured = pytest.StashKey[list[str]]()


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a figure, such as a time, for the end of the test run: too noisy to assert, too telling to lose."""
    return request.config.stash.setdefault(measured, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(measured, []):
        terminalreporter.section("measured in the browser")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_jupyterlab(tmp_path_factory.mktemp("jupyterlab")) as server:
        yield server


@contextmanager
def running_jupyterlab(folder: Path, frontend: Frontend = JUPYTERLAB) -> Iterator[Server]:
    """A JupyterLab, or another frontend, that ends with the context, all it writes in `folder`."""
    private = ("CONFIG", "DATA", "RUNTIME")
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in private},
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "QLAB_STRICT": "1",
    }
    if frontend is JUPYTERLAB:  # the others fetch no news, and settings of what they lack are an error to them
        news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    port = _free_port()
    server = Server(f"http://127.0.0.1:{port}", secrets.token_hex(16), notebooks, frontend)
    options = [option.format(notebooks=notebooks, token=server.token) for option in frontend.options]
    as_root = [] if frontend is VOILA else ["--allow-root"]
    command = [sys.executable, "-m", frontend.module, "--no-browser", f"--port={port}", *as_root, *options]
    command += ["--Voila.ip=127.0.0.1" if frontend is VOILA else "--ip=127.0.0.1"]
    log = folder / f"{frontend.module}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        _wait_for(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def chromium(chromium_path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_notebook(jupyterlab: Server, chromium: Browser) -> Iterator[Callable[[list[str]], Notebook]]:
    """A function that opens a notebook of these cells in a page of its own, runs them and returns it."""
    opened: list[Notebook] = []

    def open_(cells: list[str]) -> Notebook:
        notebook = new_notebook(chromium, jupyterlab, cells)
        opened.append(notebook)
        notebook.command("notebook:run-all-cells")
        notebook.command("application:toggle-left-area")
        return notebook

    yield open_
    for notebook in opened:
        notebook.page.context.close()
    for session in json.loads(jupyterlab.request("/api/sessions")):
        jupyterlab.request(f"/api/sessions/{session['id']}", "DELETE")


def new_notebook(chromium: Browser, jupyterlab: Server, cells: list[str]) -> Notebook:
    """A notebook of these cells in a page of its own, its kernel ready and nothing run."""
    notebook = new_page(chromium, jupyterlab)
    notebook.page.goto(jupyterlab.address(write_notebook(jupyterlab, cells)))
    notebook.idle()
    return notebook


def new_page(chromium: Browser, server: Server) -> Notebook:
    """An empty page, watched for errors and for requests that leave the machine."""
    context = chromium.new_context(viewport={"width": 1300, "height": 1000})
    notebook = Notebook(context.new_page(), server)
    context.route("**/*", lambda route: _keep_inside(route, notebook))
    notebook.page.on("pageerror", lambda error: _note_error(error, notebook))
    notebook.page.on("websocket", lambda socket: _note_outside(socket.url, notebook))
    return notebook


def write_notebook(server: Server, cells: list[str]) -> str:
    """A notebook of these cells among the server's files; returns its name."""
    name = f"{secrets.token_hex(4)}.ipynb"
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    content.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, server.notebooks / name)
    return name


@pytest.fixture
def notebook(shared_notebook: Notebook, request: pytest.FixtureRequest) -> Iterator[Notebook]:
    """The module's `shared_notebook`, with its complaints charged to the test that caused them."""
    yield shared_notebook
    try:
        shared_notebook.screenshot(request.node.name)
    except Error as error:
        shared_notebook.errors.append(f"no screenshot: {error}")
    shared_notebook.complain()


def _note_error(error: Error, notebook: Notebook) -> None:
    if str(error) not in notebook.server.frontend.own:
        notebook.errors.append(f"{error}\n{error.stack}")


def _keep_inside(route: Route, notebook: Notebook) -> None:
    if _note_outside(route.request.url, notebook):
        route.abort()
    else:
        route.continue_()


def _note_outside(url: str, notebook: Notebook) -> bool:
    is_outside = not url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))
    if is_outside and not url.startswith(notebook.server.frontend.own):
        notebook.outside.append(url)
    return is_outside


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(server: Server, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            server.request(server.frontend.alive)
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.25)
    pytest.fail(f"{server.frontend.module} did not start:\n{log.read_text()[-2000:]}")
