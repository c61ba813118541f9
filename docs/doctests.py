"""Puts the examples of docstrings into fences: Markdown would read their >>> as quotations."""

import re

import griffe

EXAMPLE = re.compile(r"(?m)^(?P<indent> *)>>> .*(?:\n(?! *$).+)*")


class Fenced(griffe.Extension):
    """A griffe extension, named in mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **options: object) -> None:
        """Change `obj`: its docstring's examples stand in fences."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with every doctest in a fence of its own."""
    return EXAMPLE.sub(lambda found: f"{found['indent']}```pycon\n{found[0]}\n{found['indent']}```", text)
