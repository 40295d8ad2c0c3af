"""Ctrl-C between the steps of a training, and not within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_delayed"]


@contextmanager
def interrupts_delayed() -> Iterator[list[Any]]:
    """A list that is empty until Ctrl-C is pressed; the second time it interrupts as ever."""
    pressed: list[Any] = []
    # Signals reach the main thread alone, and a program's own handler is left to it.
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not default:
        yield pressed
        return

    def note(number: int, _: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
