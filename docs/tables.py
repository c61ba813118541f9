"""Writes the tables of settings in techniques.md from the declarations: `python docs/tables.py`.

A table stands between `<!-- settings: NAME -->` and `<!-- end -->`; the test run compares them with the declarations.
"""

import re
import sys
from pathlib import Path

import qlab
from qlab.settings import Declaration, describe

PAGE = Path(__file__).with_name("techniques.md")
TABLE = re.compile(r"<!-- settings: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The page with its tables as the declarations have them."""
    return TABLE.sub(lambda found: f"<!-- settings: {found[1]} -->\n\n{table(found[1])}\n<!-- end -->", text)


def table(name: str) -> str:
    """The settings of one technique or analysis as a Markdown table."""
    rows = ["| setting | default | what |", "|---|---|---|"]
    rows += [f"| `{told.name}` | {_default(told)} | {_what(told)} |" for told in describe(getattr(qlab, name))]
    return "\n".join(rows) + "\n" if len(rows) > 2 else "It has no settings.\n"


def _default(told: Declaration) -> str:
    return "none" if told.default is None else f"`{told.default!r}`".replace("|", "\\|")


def _what(told: Declaration) -> str:
    low, high = told.minimum, told.maximum
    limits = [f"{low:g} to {high:g}"] if low is not None and high is not None else []
    limits = limits or ([f"at least {low:g}"] if low is not None else []) or ([f"at most {high:g}"] if high else [])
    limits += [told.unit] if told.unit else []
    limits += ["one of " + ", ".join(f"`{choice}`" for choice in told.choices)] if told.choices else []
    limits += ["only in code"] if told.kind == "hidden" else []
    return told.help.replace("|", "\\|") + (f" ({'; '.join(limits)})" if limits else "")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE} is up to date.\n")
