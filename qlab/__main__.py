"""The command `qlab`: `qlab --version`, and `qlab lab [FOLDER]`, which opens the tutorials in JupyterLab."""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qlab import __version__

FOLDER = "qlab-tutorials"
FIRST = "00_tour.ipynb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; `arguments` are those of the process unless given."""
    own, options = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = argparse.ArgumentParser(prog="qlab", description="A workbench for quantizing PyTorch models in Jupyter.")
    parser.add_argument("--version", action="version", version=f"qlab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    lab = commands.add_parser("lab", help="copy the tutorials into a folder and open them in JupyterLab")
    lab.add_argument("folder", nargs="?", type=Path, default=Path(FOLDER), help=f"where they go (default: {FOLDER})")
    lab.add_argument("--copy-only", action="store_true", help="copy the tutorials and stop")
    lab.add_argument("--overwrite", action="store_true", help="replace tutorials that you changed")
    lab.epilog = "What follows -- is handed on to JupyterLab: qlab lab -- --no-browser --port 8899"
    chosen = parser.parse_args(own)
    return open_lab(chosen.folder, options, copy_only=chosen.copy_only, overwrite=chosen.overwrite)


def open_lab(folder: Path, options: Sequence[str] = (), *, copy_only: bool = False, overwrite: bool = False) -> int:
    """Copies the tutorials and runs JupyterLab on the first, on loopback; returns its exit status."""
    if folder.exists() and not folder.is_dir():
        return _refuse(f"{folder} is a file; name a folder: qlab lab FOLDER.")
    try:
        new, kept = copy_tutorials(folder, overwrite=overwrite)
    except OSError as error:
        return _refuse(f"the tutorials could not be copied into {folder}: {error}.")
    if not (folder / FIRST).exists():
        return _refuse("this installation of qlab holds no tutorials; they are in the folder notebooks of its source.")
    _say(f"{len(new)} tutorials copied into {folder}.")
    if kept:
        _say(f"Left as you changed them: {', '.join(kept)}. To replace them: qlab lab {folder} --overwrite")
    if copy_only:
        return 0
    if importlib.util.find_spec("jupyterlab") is None:
        return _refuse('JupyterLab is not installed: pip install "qlab[lab]".')
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--ServerApp.root_dir={folder.resolve()}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in containers; the server is reached from this machine alone
    return subprocess.run([*command, *options, str(folder.resolve() / FIRST)], check=False).returncode


def copy_tutorials(folder: Path, *, overwrite: bool = False) -> tuple[list[str], list[str]]:
    """Writes the tutorials into `folder`; names of those written, and of those left because they differ there.

    overwrite: write those as well. A tutorial that is there unchanged is neither.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new, kept = [], []
    for source in _tutorials():
        content, target = source.read_bytes(), folder / source.name
        if target.exists():
            if target.read_bytes() == content:
                continue
            if not overwrite:
                kept.append(source.name)
                continue
        beside = target.with_name(f".{target.name}.part")
        beside.write_bytes(content)
        beside.replace(target)
        new.append(source.name)
    return new, kept


def _tutorials() -> list[Path]:
    """The notebooks within the package, in order."""
    folder = Path(str(resources.files("qlab"))) / "tutorials"
    return sorted(folder.glob("*.ipynb"))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _say(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"qlab: {sentence}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
