"""Writes the badges that need the address of the repository: `python docs/badges.py OWNER/NAME [TAG]`.

Binder's stands in README.md and opens the tour; Colab's stand in tutorials.md, beside the cell that Colab needs first.
Both go between `<!-- badges -->` and `<!-- end -->`; without an address there is nothing to link to.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- badges -->\n.*?<!-- end -->", re.DOTALL)
FIRST = "notebooks/00_tour.ipynb"
BINDER = "https://mybinder.org"
COLAB = "https://colab.research.google.com"


def binder(repository: str, tag: str) -> str:
    """The badge that opens the tour in JupyterLab on Binder."""
    target = f"{BINDER}/v2/gh/{repository}/{tag}?urlpath=lab/tree/{FIRST}"
    return f"[![Open the tour on Binder]({BINDER}/badge_logo.svg)]({target})\n"


def colab(repository: str, tag: str, names: list[str]) -> str:
    """Badges of all tutorials, after the cell that each of them needs first in Colab."""
    cell = f"%pip install -q git+https://github.com/{repository}@{tag}"
    lines = [f"In Colab, run one cell first: `{cell}`. Open there:", ""]
    for name in names:
        target = f"{COLAB}/github/{repository}/blob/{tag}/notebooks/{name}.ipynb"
        lines.append(f"- [![{name} in Colab]({COLAB}/assets/colab-badge.svg)]({target}) `{name}`")
    return "\n".join(lines) + "\n"


def placed(text: str, badges: str) -> str:
    """The text with `badges` in their place."""
    return PLACE.sub(lambda _: f"<!-- badges -->\n{badges}<!-- end -->", text)


def main() -> None:
    """Writes both pages for the repository named on the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("repository", help="OWNER/NAME")
    arguments.add_argument("tag", nargs="?", default="main", help="a tag of a release, else the branch main")
    chosen = arguments.parse_args()
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    pages = {
        ROOT / "README.md": binder(chosen.repository, chosen.tag),
        ROOT / "docs" / "tutorials.md": colab(chosen.repository, chosen.tag, names),
    }
    for page, badges in pages.items():
        page.write_text(placed(page.read_text(encoding="utf-8"), badges), encoding="utf-8")


if __name__ == "__main__":
    main()
