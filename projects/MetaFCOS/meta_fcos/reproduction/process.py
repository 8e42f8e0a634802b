"""A training in a process of its own, which ends with the one that started it.

A process that has trained keeps GPU memory that the next experiment may need, and the peak of
one would count for the next.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.errors import EXIT_STATUS_USER_ERROR, D2ScaleError

_CHILD = "meta_fcos.reproduction.child"


def run_command(arguments: Sequence[str], datasets: Path) -> None:
    """Run ``d2scale`` with ``arguments`` and wait for its end.

    Ctrl-C ends it in its own way, a second Ctrl-C at once.

    Args:
        arguments: the command and its options.
        datasets: where dataset names resolve.

    Raises:
        D2ScaleError: if it fails; it has told why.
        KeyboardInterrupt: after it has ended.
    """
    command = [sys.executable, "-m", _CHILD, str(os.getpid()), *arguments]
    environment = {**os.environ, ROOT_VARIABLE: str(datasets.absolute())}
    # In a session of its own the terminal does not interrupt it: exactly one signal arrives.
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603  our own
    try:
        status = process.wait()
    except BaseException:
        _end(process)
        raise
    if status:
        raise D2ScaleError(_reason(status))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(status: int) -> str:
    if status == EXIT_STATUS_USER_ERROR:
        return "the training stopped, for the reason above"
    if status < 0:
        return f"the training was ended from outside by {signal.Signals(-status).name}"
    return f"the training failed with exit status {status}, as above"
