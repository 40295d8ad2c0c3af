"""The README's code runs as printed."""

from __future__ import annotations

from pathlib import Path

from tools import run_docs

ROOT = Path(__file__).parent.parent


def test_the_code_blocks_run_in_order(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    python = [b for b in run_docs.blocks(page.read_text()) if b.language == "python"]
    assert len(python) == 4
    names = run_docs.run(page, tmp_path)
    assert {"again", "loss", "samples"} <= names.keys()
