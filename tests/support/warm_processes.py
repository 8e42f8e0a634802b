"""Processes that are forked from one that has imported torch, which takes a new one seconds.

They have one hash seed, so what depends on the order of a set differs between ranks only where
they are spawned, as in ``tests/launch`` and ``test_kills.py``.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any
from unittest import mock

import numpy as np
import torch

from d2scale.launch import launch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "pytest", "torchvision", "d2scale.cli", "d2scale.engine.run", "meta_fcos.detector"]
)
_start_processes = launch.start_processes


class Surroundings:
    """What a new process gets of the one that starts it: environment, directory and output."""

    def __init__(self, environment: Mapping[str, str], outputs: Sequence[int] = (1, 2)) -> None:
        self.environment, self.outputs = dict(environment), outputs

    def __reduce__(self) -> tuple[Any, ...]:
        return _enter, (self.environment, *map(DupFd, self.outputs))


def _enter(environment: Mapping[str, str], *outputs: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.detach(), number)
    if "OMP_NUM_THREADS" in environment:  # which torch reads when it is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    np.random.seed()  # a fork has the state of the process that it comes from
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    gc.freeze()  # looking through torch's objects for garbage takes 0.2 s


@contextmanager
def warm_ranks() -> Iterator[None]:
    """Let :func:`d2scale.launch.launch.launch` start its ranks here."""
    with mock.patch.object(launch, "start_processes", _start_ranks):
        yield


def _start_ranks(
    function: Any, args: Sequence[Any], count: int, *, join: bool, start_method: str
) -> Any:
    given = (Surroundings(os.environ), function, *args)
    return _start_processes(_run_rank, given, count, join=join, start_method="forkserver")


def _run_rank(rank: int, surroundings: None, function: Any, *args: Any) -> None:
    function(rank, *args)


class Python:
    """What ``python *arguments`` does, for a script or -m and a module; its ranks are forks too."""

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self._arguments = [*arguments]
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        numbers = [file.fileno() for file in self._outputs]
        surroundings = Surroundings({**os.environ, **environment}, numbers)
        self._process = CONTEXT.Process(target=_run_main, args=(surroundings, self._arguments))
        self._process.start()
        self.kill = self._process.kill

    def end(self, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Return its status and what it has printed; kill it after so many seconds."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            self._process.join()
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        if status is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout, *texts)
        return subprocess.CompletedProcess(self._arguments, status, *texts)


def run_python(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Do what ``python *arguments`` does, and return its end."""
    return Python(arguments, **environment).end()


def _run_main(surroundings: None, arguments: list[str]) -> None:
    def fork_ranks(*args: Any, **options: Any) -> Any:
        return _start_processes(*args, **{**options, "start_method": "fork"})

    launch.start_processes = fork_ranks
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
