"""A griffe extension: in docstrings, the roles and literal blocks of Sphinx as Markdown.

``:class:`Name``` becomes a link to where the site documents Name, and ``::`` before an indented
block of code a plain colon. Names that share a line of ``Args:`` and the like stay together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod):`(~?)([\w.]+)`")
_NAMES = re.compile(r"^ +\w+(?:, \w+)+: ", flags=re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = _ROLE.sub(_link, text)
    text = re.sub(r"::\n(?=\n)", ":\n", text)
    # What follows an ordinary space would be taken for the type of what is before it.
    return _NAMES.sub(lambda match: match[0].replace(", ", ",\N{NO-BREAK SPACE}"), text)


def _link(match: re.Match[str]) -> str:
    shown = match[2].rpartition(".")[2] if match[1] else match[2]
    return f"[`{shown}`][{match[2]}]"
