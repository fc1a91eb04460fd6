"""The end of a child process together with its parent. Knows nothing of training."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_GLANCE_S = 0.5


def die_with_parent(parent: int | None) -> None:
    """End this process when `parent`, which started it, is gone; None: whoever its parent is now.

    Linux does it even while a hung step holds the interpreter's lock, but also when only the thread that
    started us ends: the parent has to keep that one. Elsewhere a thread looks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    expected = os.getppid() if parent is None else parent
    if os.getppid() != expected:  # it went before the system knew that we care
        os._exit(0)
    threading.Thread(target=_watch, args=(expected,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_GLANCE_S)
    os._exit(0)
