"""Start the ranks of a run as processes, join them in a group, and raise their errors here."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from d2scale.errors import EXIT_STATUS_USER_ERROR, ConfigError, D2ScaleError
from d2scale.launch.elastic import end_with, join_machines
from d2scale.launch.group import run_in_group, spawned_group, torchruns_group, watch_ranks
from d2scale.launch.machines import Watch, machines_met
from d2scale.launch.topology import (
    Topology,
    torchrun_faults,
    under_torchrun,
)
from d2scale.run_folder.files import write_atomically
from d2scale.run_folder.shortages import telling_of_shortages

_LATER_SECONDS = 1.0
# A process that is stopped, or caught in the kernel, does not end by SIGTERM.
_TERMINATE_SECONDS = 5.0
_THREADS = "OMP_NUM_THREADS"
# How gloo and NCCL tell that a rank on another machine is gone.
_BROKEN_CONNECTION = ("gloo/transport", "Connection closed by peer", "DistBackendError")


class RankError(RuntimeError):
    """A rank ended by a fault of the program; the text is its traceback."""


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    topology: Topology | None = None,
    *,
    use_cuda: bool = False,
) -> Any:
    """Run ``function(*args)`` on every rank and return what the first rank here returned.

    One process on one machine runs in place, without a process group. Under torchrun the
    ranks exist already: each call runs its own. Otherwise ranks are spawned, so ``function``
    must be importable and ``args`` must pickle. ``function`` finds its process group initialised
    (nccl with CUDA, gloo without) and, with CUDA, its device set: one GPU to a rank.

    Raises:
        D2ScaleError: what a rank raised, or a rank that was killed.
        RankError: any other error of a rank.
        SystemExit: with the status of a mistake of the user, of which a rank has told already.
        KeyboardInterrupt: Ctrl-C, after all ranks have ended.
    """
    topology = topology or Topology()
    if faults := torchrun_faults():
        raise ConfigError(faults)
    if under_torchrun():
        return _run_rank_of_torchrun(function, args, topology, use_cuda=use_cuda)
    if topology.world_size == 1:
        return function(*args)
    if faults := topology.faults():
        raise ConfigError(faults)
    with (
        machines_met(topology, "cuda" if use_cuda else "cpu") as watch,
        tempfile.TemporaryDirectory(prefix="d2scale-") as name,
    ):
        folder = Path(name)
        rank_args = (function, tuple(args), topology, folder, use_cuda)
        _start_and_wait(rank_args, topology, folder, watch)
        return pickle.loads((folder / "result").read_bytes())  # noqa: S301  written by a rank


def _run_rank_of_torchrun(
    function: Callable[..., Any], args: Sequence[Any], topology: Topology, *, use_cuda: bool
) -> Any:
    group = torchruns_group()
    watch = join_machines(group.store, group.rank, group.world_size)
    watch_ranks(group, topology, end_with)
    result = run_in_group(function, args, group, topology, use_cuda=use_cuda)
    if watch is not None:
        watch.leave()
    return result


def _start_and_wait(
    rank_args: tuple[Any, ...], topology: Topology, folder: Path, watch: Watch | None
) -> None:
    """Run all ranks of this machine; at the first failure, and at Ctrl-C, end the others."""
    # What it warns of, ending the other ranks, is not worth a line.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    processes: Sequence[Any] = ()
    try:
        with _threads_divided(topology.num_processes), _interrupts_waiting():
            ranks = start_processes(
                _run_rank, rank_args, topology.num_processes, join=False, start_method="spawn"
            )
            processes = ranks.processes
        while not ranks.join(timeout=_LATER_SECONDS):
            if watch and (loss := watch.loss()):
                raise loss
    except (ProcessExitedException, ProcessRaisedException) as first:
        error = _error_of_ranks(first, topology, folder)
        if watch and any(text in str(error) for text in _BROKEN_CONNECTION):
            error = watch.loss_behind_an_error() or error
        raise error from None
    finally:
        _end(processes)


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + _TERMINATE_SECONDS
    for process in processes:
        process.join(timeout=max(0, until - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()


def _error_of_ranks(
    first: ProcessExitedException | ProcessRaisedException, topology: Topology, folder: Path
) -> BaseException:
    """Return the first mistake of the user that a rank met, or else what ended the first rank."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        error: D2ScaleError = pickle.loads(errors[0].read_bytes())  # noqa: S301  by a rank
        return error
    rank = topology.machine_rank * topology.num_processes + first.error_index
    if isinstance(first, ProcessRaisedException):
        return RankError(f"rank {rank} failed:\n{first}")
    if first.signal_name == "SIGINT":
        return KeyboardInterrupt()
    if first.exit_code == EXIT_STATUS_USER_ERROR:
        return SystemExit(EXIT_STATUS_USER_ERROR)  # the ranks have told of it
    if first.signal_name is None:
        return RankError(f"rank {rank} ended with exit status {first.exit_code}")
    killed = first.signal_name == "SIGKILL"
    cause = "; the system does that when the machine runs out of memory" if killed else ""
    return D2ScaleError(f"rank {rank} was ended from outside by {first.signal_name}{cause}")


def _run_rank(
    local_rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    topology: Topology,
    folder: Path,
    use_cuda: bool,
) -> None:
    """Run a spawned rank; put its result, or its D2ScaleError, into ``folder`` for the parent."""
    # torch lets a rank end with its parent, but for one that died while the rank imported torch.
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    # Ctrl-C reaches every process of a terminal: end at once, wherever a collective hangs.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    error_file = folder / f"{local_rank}.error"
    try:
        with telling_of_shortages():
            group = spawned_group(local_rank, topology, folder)
            # The rank itself may wait for ever.
            watch_ranks(group, topology, lambda error: os._exit(_hand_over(error, error_file)))
            result = run_in_group(function, args, group, topology, use_cuda=use_cuda)
            if local_rank == 0:
                (folder / "result").write_bytes(pickle.dumps(result))
    except D2ScaleError as error:
        sys.exit(_hand_over(error, error_file))
    except Exception:
        # Perhaps only because another rank was killed: the parent shall see that one first.
        time.sleep(_LATER_SECONDS)
        raise


def _hand_over(error: D2ScaleError, path: Path) -> int:
    """Put a rank's error into a file for the parent, or tell it here; return the exit status."""
    try:
        write_atomically(path, pickle.dumps(error))
    except ConfigError:  # there is no room for temporary files
        sys.stderr.writelines(f"d2scale: error: {line}\n" for line in str(error).splitlines())
        return EXIT_STATUS_USER_ERROR
    return 1


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Within the context Ctrl-C waits; in a process that is started here, until it unblocks it.

    A rank that is still importing torch would answer with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # It would unblock Ctrl-C when the first process starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads_divided(num_processes: int) -> Iterator[None]:
    """Give each rank its part of the cores, unless the user has decided."""
    # Cores that this process may use; all of the machine's where that cannot be asked.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = before or str(max(1, (cores or 1) // num_processes))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
