"""mkdocs hooks: links from pages to files outside docs/ work on the site as they do on GitHub.

CONTRIBUTING.md and CHANGELOG.md become pages of the site, and links to the README lead to its home.
Any other file that a page links to, such as a header or an example, is copied to the site. A link
to a file that does not exist stays, and mkdocs reports it.

The content of a numbered list is indented by three on GitHub, and by four for mkdocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files of the root and the pages they are on the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
MADE = {page: name for name, page in PAGES.items() if page != "index.md"}
SOURCES = "source"
# Code, in which nothing is a link; else the target of one.
_LINK = re.compile(r"^( *)```.*?^\1```[ \t]*$|`[^`\n]+`|\]\(([^()\s]+)\)", flags=re.M | re.S)
_ITEM = re.compile(r"^(\d+\. .*\n)((?: {3}.*\n|\n+(?= {3}))+)", flags=re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made of the root's files, and the files that pages link to."""
    for page, name in MADE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    linked = set()
    for file in files.documentation_pages():
        found = (match[2] for match in _LINK.finditer(file.content_string) if match[2])
        names = (_path_of(link, file.src_uri) for link in found)
        linked |= {name for name in names if name is not None and _is_source(name)}
    for name in sorted(linked):
        file = File.generated(config, f"{SOURCES}/{name}", abs_src_path=str(ROOT / name))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where the site has their targets, and indent numbered lists for mkdocs."""

    def rewritten(match: re.Match[str]) -> str:
        name = None if match[2] is None else _path_of(match[2], page.file.src_uri)
        if name is None:
            return match[0]
        if name.startswith("docs/"):
            target = name.removeprefix("docs/")
        elif name in PAGES:
            target = PAGES[name]
        elif _is_source(name):
            target = f"{SOURCES}/{name}"
        else:
            # mkdocs will say that it leads nowhere.
            return match[0]
        anchor = match[2].partition("#")[2]
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"]({relative}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(rewritten, _ITEM.sub(_indented, markdown))


def _indented(item: re.Match[str]) -> str:
    body = re.sub("^(?= )", " ", item[2], flags=re.M)
    # After a paragraph of its own an item ends, for mkdocs, with an empty line.
    return item[1] + body + ("\n" if "\n\n" in body else "")


def _path_of(link: str, src_uri: str) -> str | None:
    """The file of the repository that a link of a page is to; None for addresses and anchors."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    source = MADE.get(src_uri) or f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _is_source(name: str) -> bool:
    return not name.startswith("docs/") and name not in PAGES and (ROOT / name).is_file()
