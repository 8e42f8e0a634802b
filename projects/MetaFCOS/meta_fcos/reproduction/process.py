"""``d2scale`` in a process of its own, which is interrupted when the one that started it ends.

A process that has trained keeps GPU memory that the next experiment may need, and its peak
would count for the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.errors import EXIT_STATUS_USER_ERROR, D2ScaleError


def run_command(arguments: Sequence[str], datasets: Path) -> None:
    """Run ``d2scale`` with ``arguments``, on the data in ``datasets``, and wait for its end.

    Ctrl-C interrupts it and waits for it, a second Ctrl-C kills it; KeyboardInterrupt comes after
    its end. D2ScaleError if it fails; it has printed the reason.
    """
    command = [sys.executable, "-m", __name__, *arguments]
    environment = {**os.environ, ROOT_VARIABLE: str(datasets.absolute())}
    # Its standard input is a pipe that only this process can write to: the system closes it even
    # if this process is killed. In a session of its own it does not get the terminal's Ctrl-C,
    # which would interrupt it twice.
    process = subprocess.Popen(  # noqa: S603  our own module
        command, env=environment, stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    try:
        status = process.wait()
    except BaseException:
        process.stdin.close()
        try:
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    process.stdin.close()
    if status:
        raise D2ScaleError(_reason(status))


def _reason(status: int) -> str:
    if status == EXIT_STATUS_USER_ERROR:
        return "the training stopped, for the reason above"
    if status < 0:
        return f"the training was ended from outside by {signal.Signals(-status).name}"
    return f"the training failed with exit status {status}, as above"


def _interrupt_at_end_of_input() -> None:
    os.read(0, 1)  # Nothing is ever written: it returns when the pipe is closed.
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    from d2scale.cli import main

    # A job in the background of a shell ignores Ctrl-C, and so would this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
    sys.exit(main())
