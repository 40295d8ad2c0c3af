"""The documentation: its code runs and prints what it says, its links lead somewhere, it builds."""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import score_kernels
from score_kernels import diffusion, losses, sampling
from score_kernels.cli import main as cli
from score_kernels.noise import Purpose
from tools import run_docs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_VARIABLE = re.compile(r"[A-Z_]+=")


def languages(page: Path) -> set[str]:
    return {block.language for block in run_docs.blocks(TEXTS[page])}


def links(page: Path) -> list[tuple[Path, str]]:
    """The files and anchors inside the repository that a page links to."""
    found = []
    for target in _LINK.findall(run_docs.prose(TEXTS[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(
        r"^#+ +(.+?)(?: +\{[^}]*\})?$", run_docs._FENCE.sub("", TEXTS[page]), re.M
    )
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r" +", "-", words.strip()) for words in plain}


# The README's code is run by tests/test_readme.py, that of CONTRIBUTING.md below.
CODE = [page for page in PAGES if "python" in languages(page) and page.parent != ROOT]


@pytest.mark.parametrize("page", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "run_docs.py", page, "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    if made:
        # The pictures that the page shows, no more and no fewer.
        shown = {path for path, _ in links(page) if path.suffix == ".png"}
        assert {(page.parent / path).resolve() for path in made} == shown
        assert all((tmp_path / path).stat().st_size > 5000 for path in made)


def test_the_sampler_of_contributing_samples() -> None:
    names = run_docs.run(ROOT / "CONTRIBUTING.md", ROOT)
    levels = score_kernels.geometric_sigmas(10.0, 0.1, 20)
    x = names["ancestral"](
        lambda x, sigma: -x / (1 + sigma[:, None] ** 2), (4000, 2), levels, seed=0
    )
    # Each step is linear: so is what becomes of the variance.
    variance = float(levels[0]) ** 2
    for sigma, following in zip(levels.tolist(), [*levels[1:].tolist(), 0.0], strict=True):
        gain = sigma**2 - following**2
        kept = 1 - gain / (1 + sigma**2)
        variance = kept**2 * variance + following**2 * gain / sigma**2
    # Five standard deviations of the variance of 8000 numbers.
    assert abs(float(x.square().mean()) / variance - 1) < 5 * (2 / 8000) ** 0.5


def test_a_page_that_prints_something_else_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    def run(said: str, printed: str, **options: Any) -> None:
        page.write_text(f"Text.\n\n```python\nprint({printed!r})\n```\n\n```text\n{said}\n```\n")
        run_docs.run(page, tmp_path, **options)

    for said, printed in (("a 0.52", "a 0.51"), ("1200", "1250"), ("a  b", "a b"), ("x 0", "x 0")):
        run(said, printed)
    for said, printed in (
        ("a 0.52", "a 0.60"),
        ("1200", "1400"),
        ("a b", "a c"),
        ("a", ""),
        ("True", "False"),
        ("1 2", "1"),
    ):
        with pytest.raises(
            run_docs.Difference, match=re.escape(f"{page}:8: the page says\n{said}")
        ):
            run(said, printed)
    run("old", "new 1", write=True)
    assert page.read_text().endswith("```text\nnew 1\n```\n")
    page.write_text("```python\nx = 1\n\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_docs.run(page, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 4


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {path.name}#{anchor}"


def test_every_picture_is_shown() -> None:
    shown = {path for page in PAGES for path, _ in links(page)}
    there = set(DOCS.rglob("*.png"))
    assert there and there - shown == set()


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's sh blocks, as words, without comments and variables before them."""
    found = []
    for block in run_docs.blocks(TEXTS[page]):
        if block.language != "sh":
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word in ("|", "&&", ">", ";"):
                    found.append(list(dropwhile(_VARIABLE.match, words)))
                    words = []
                else:
                    words.append(word)
    return [words for words in found if words]


SHELL = [page for page in PAGES if "sh" in languages(page)]


@pytest.mark.parametrize("page", SHELL, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """score-kernels parses its command lines; files, modules and targets of make exist."""
    parsed: list[argparse.Namespace] = []

    def note(arguments: argparse.Namespace) -> int:
        parsed.append(arguments)
        return 0

    monkeypatch.setattr(cli, "_COMMANDS", dict.fromkeys(cli._COMMANDS, note))
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in commands(page):
        name = Path(line[0]).name
        if "score_kernels.cli" in line:
            name, line = "score-kernels", line[line.index("score_kernels.cli") :]
        if name == "score-kernels":
            assert cli.main(line[1:]) == 0
            assert parsed.pop().command == line[1]
        elif name == "make":
            assert set(line[1:]) <= set(targets), line
        elif name == "python" and line[1] == "-m":
            module = ROOT / line[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), line
        elif name == "python":
            source = (ROOT / line[1]).read_text()
            assert all(f'"{w}"' in source for w in line[2:] if w.startswith("--")), line
        else:
            assert name in ("pip", "mkdocs", "pre-commit", "dieharder"), line


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--no-such-option"])


def test_the_table_of_purposes_is_the_code_s() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d+)", TEXTS[DOCS / "noise.md"], re.M)
    assert [(name, int(number)) for name, number in rows] == [(p.name, p) for p in Purpose]


def test_the_table_of_variables_is_the_code_s() -> None:
    named = re.findall(r"^\| `(SCORE_KERNELS_[A-Z_]+)` \|", TEXTS[DOCS / "install.md"], re.M)
    assert sorted(named) == sorted(cli.VARIABLES)


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(TEXTS[page] for page in (DOCS / "api").glob("*.md"))
    listed = set()
    for path in re.findall(r"^::: (score_kernels[\w.]+)$", text, re.M):
        listed.add(path.rpartition(".")[2])
        found = pkgutil.resolve_name(path)
        # The page of ops names each op; of other modules all names are shown.
        if isinstance(found, ModuleType) and found is not score_kernels.ops:
            listed |= set(getattr(found, "__all__", ()))
    for module in (score_kernels, score_kernels.ops, diffusion, losses, sampling):
        assert set(module.__all__) <= listed, module.__name__


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """mkdocs build --strict: dead links, unknown references and pages out of the navigation."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    # A page of the docs and one of the root link to files outside docs/.
    noise = (tmp_path / "site" / "noise" / "index.html").read_text()
    assert 'href="../source/csrc/noise.h"' in noise
    assert (tmp_path / "site" / "source" / "csrc" / "noise.h").read_text().startswith("//")
    assert (tmp_path / "site" / "source" / "examples" / "inpainting.py").exists()
    # Its lists hold their code.
    contributing = (tmp_path / "site" / "contributing" / "index.html").read_text()
    assert "```" not in contributing and contributing.count("<ol>") == 1
    assert contributing.count("<li>") == 4
    # Nothing is fetched from other servers when a page is read.
    assert "fonts.googleapis.com" not in noise and not re.search(r'<script src="https?:', noise)
