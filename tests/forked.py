"""Work in a process of its own, which may be killed on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def attempt(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Do the work in a forked process, killed after so many seconds. Whether it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "an attempt failed"
    return True
