"""``d2scale`` in a process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# linux/prctl.h: the signal that a process gets when its parent dies.
_SET_PARENT_DEATH_SIGNAL = 1


def end_with(parent: int) -> None:
    """Have the system interrupt this process when process ``parent`` dies, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGINT))
        if os.getppid() != parent:  # It died before the system was told.
            sys.exit(130)


if __name__ == "__main__":
    # Until the command is there to say that it was interrupted, it ends without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with(int(sys.argv[1]))
    from d2scale.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[2:]))
