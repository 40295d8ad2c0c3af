"""mkdocs hooks: links from pages to files outside docs/ work on the site as they do on GitHub.

CONTRIBUTING.md and CHANGELOG.md become pages of the site. What a page says of the README is on the
site's home. Any other file that a page links to, such as a header or an example, is copied to the
site as it is. A link to a file that does not exist stays, and mkdocs reports it.

Lists that are numbered hold on GitHub what is indented by three, for mkdocs by four.
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
        places = (_place(link, file.src_uri) for link in found)
        linked |= {place for place in places if place is not None and _is_source(place)}
    for place in sorted(linked):
        file = File.generated(config, f"{SOURCES}/{place}", abs_src_path=str(ROOT / place))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where the site has their targets, and indent numbered lists for mkdocs."""

    def rewritten(match: re.Match[str]) -> str:
        place = None if match[2] is None else _place(match[2], page.file.src_uri)
        if place is None:
            return match[0]
        if place.startswith("docs/"):
            target = place.removeprefix("docs/")
        elif place in PAGES:
            target = PAGES[place]
        elif _is_source(place):
            target = f"{SOURCES}/{place}"
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


def _place(link: str, src_uri: str) -> str | None:
    """The file of the repository that a link of a page is to; None for addresses and anchors."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    source = MADE.get(src_uri) or f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _is_source(place: str) -> bool:
    return not place.startswith("docs/") and place not in PAGES and (ROOT / place).is_file()
