"""Writes what needs the address of the repository: `python docs/badges.py OWNER/NAME [TAG]`; once more for another tag.

Binder's badge stands in README.md and opens the tour in JupyterLab; Colab's stand in tutorials.md. Both go between
`<!-- badges -->` and `<!-- end -->`. Every tutorial gets the one cell that Colab needs, after its title: a person who
comes by a badge has nothing installed there. Without an address there is nothing to link to and nothing to install.
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- badges -->\n.*?<!-- end -->", re.DOTALL)
FIRST = "notebooks/00_tour.ipynb"
BINDER = "https://mybinder.org"
COLAB = "https://colab.research.google.com"
TAGS = ["colab", "skip-execution", "nbval-skip"]  # nbclient and nbval leave it out: no output, no number


def binder(repository: str, tag: str) -> str:
    """The badge that opens the tour in JupyterLab on Binder."""
    target = f"{BINDER}/v2/gh/{repository}/{tag}?urlpath=lab/tree/{FIRST}"
    return f"[![Open the tour on Binder]({BINDER}/badge_logo.svg)]({target})\n"


def colab(repository: str, tag: str, names: list[str]) -> str:
    """Badges of all tutorials."""
    lines = ["In Colab, run the first cell of a tutorial: it installs qlab there, and nothing anywhere else.", ""]
    for name in names:
        target = f"{COLAB}/github/{repository}/blob/{tag}/notebooks/{name}.ipynb"
        lines.append(f"- [![{name} in Colab]({COLAB}/assets/colab-badge.svg)]({target}) `{name}`")
    return "\n".join(lines) + "\n"


def colab_cell(repository: str, tag: str, extra: str = "") -> nbformat.NotebookNode:
    """The cell that installs qlab in Colab and allows its widgets; elsewhere it does nothing."""
    source = f"""\
        # In Colab this installs qlab; elsewhere it does nothing.
        import sys

        if "google.colab" in sys.modules:
            %pip install -q "qlab{extra} @ git+https://github.com/{repository}@{tag}"
            from google.colab import output
            output.enable_custom_widget_manager()"""
    return nbformat.v4.new_code_cell(textwrap.dedent(source), id="colab", metadata={"tags": TAGS})


def placed(text: str, badges: str) -> str:
    """The text with `badges` in their place."""
    return PLACE.sub(lambda _: f"<!-- badges -->\n{badges}<!-- end -->", text)


def with_cell(notebook: nbformat.NotebookNode, repository: str, tag: str) -> nbformat.NotebookNode:
    """The tutorial with Colab's cell after its title, in place of an earlier one."""
    cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    extra = "[hub]" if any("qlab[hub]" in cell.source for cell in cells) else ""
    return nbformat.NotebookNode(notebook | {"cells": [cells[0], colab_cell(repository, tag, extra), *cells[1:]]})


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Writes pages and tutorials for the repository named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("tag", nargs="?", default="main", help="a tag of a release, else the branch main")
    chosen = parser.parse_args(arguments)
    address = (chosen.repository, chosen.tag)
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    pages = {
        root / "README.md": binder(*address),
        root / "docs" / "tutorials.md": colab(*address, [path.stem for path in paths]),
    }
    for page, badges in pages.items():
        page.write_text(placed(page.read_text(encoding="utf-8"), badges), encoding="utf-8")
    for path in paths:
        nbformat.write(with_cell(nbformat.read(path, as_version=4), *address), path)


if __name__ == "__main__":
    main()
