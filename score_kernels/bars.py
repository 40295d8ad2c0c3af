"""Progress bars that do not fill log files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """`tqdm`, which writes a line a minute where stderr is neither a terminal nor a notebook."""
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(*arguments, mininterval=0.1 if live else 60.0, **options)
