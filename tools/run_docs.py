"""Runs the code of documentation pages, and checks what it prints.

    python tools/run_docs.py docs/tutorial.md                 # makes docs/tutorial/*.png anew
    python tools/run_docs.py docs/tutorial.md --folder /tmp/t --write

The Python blocks of a page run in order, in one namespace, in the page's folder or the one named. A
block marked ``text`` right after a Python block is what that block prints: words must be the same,
numbers the same to 10% or 0.02, since a trained network's last digits are another machine's own.
A block that begins with a comment that is a file's name is written to that file instead.
``--write`` puts what was printed into the page instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "Difference", "blocks", "prose", "run"]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ \t]*$", flags=re.M | re.S)
_FILE = re.compile(r"(?://|#) ([\w-]+\.\w+)\n")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_RELATIVE, _ABSOLUTE = 0.1, 0.02


class Difference(Exception):
    """A block prints something else than the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its code without the fence's indent, its lines."""

    language: str
    code: str
    # Of the first line of the code, from 1.
    line: int
    # Where the code is in the page's text.
    span: tuple[int, int]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(
            match[2],
            textwrap.dedent(match[3]),
            text.count("\n", 0, match.start(3)) + 1,
            match.span(3),
        )
        for match in _FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    """A page without its fenced blocks and its inline code: where its links are."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "``", _FENCE.sub("", text), flags=re.S)


def run(page: Path, folder: Path, *, write: bool = False) -> dict[str, Any]:
    """Run a page's Python blocks in a folder, and check or write what they print.

    Returns:
        The namespace after the last block.

    Raises:
        Difference: a block prints something else than the page says, and `write` is false.
        Exception: whatever a block raises; the traceback names the page and its line.
    """
    text = page.read_text(encoding="utf-8")
    found = blocks(text)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: list[tuple[Block, str]] = []
    with _inside(folder):
        for block, following in zip(found, [*found[1:], None], strict=True):
            if file := _FILE.match(block.code):
                Path(file[1]).write_text(block.code, encoding="utf-8")
                continue
            if block.language != "python":
                continue
            output = io.StringIO()
            # Blank lines before it make the line numbers of a traceback those of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, names)
            if following is not None and _prints(text, block, following):
                printed.append((following, output.getvalue()))
            elif output.getvalue():
                sys.stdout.write(output.getvalue())
    if write:
        for block, output_text in reversed(printed):
            text = text[: block.span[0]] + output_text + text[block.span[1] :]
        page.write_text(text, encoding="utf-8")
    else:
        for block, output_text in printed:
            _compare(f"{page}:{block.line}", block.code, output_text)
    return names


def _prints(text: str, block: Block, following: Block) -> bool:
    """Whether the second block is what the first one prints: text, with nothing in between."""
    between = text[block.span[1] : following.span[0]]
    return following.language == "text" and between.split() == ["```", "```text"]


def _compare(where: str, said: str, printed: str) -> None:
    said, printed = (text.rstrip() for text in (said, printed))
    same = _NUMBER.sub("#", said).split() == _NUMBER.sub("#", printed).split() and all(
        abs(a - b) <= max(_ABSOLUTE, _RELATIVE * abs(a))
        for a, b in zip(_numbers(said), _numbers(printed), strict=True)
    )
    if not same:
        raise Difference(f"{where}: the page says\n{said}\nand the code prints\n{printed}")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    # contextlib.chdir, which Python 3.10 does not have.
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, help="where to run (default: the page's folder)")
    parser.add_argument("--write", action="store_true", help="write what is printed to the page")
    arguments = parser.parse_args(argv)
    # Pictures go to files, whatever window system there is.
    os.environ["MPLBACKEND"] = "agg"
    for page in arguments.pages:
        folder = arguments.folder or page.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run(page.resolve(), folder, write=arguments.write)
        except Difference as difference:
            print(difference, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
