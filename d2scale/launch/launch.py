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
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from d2scale.errors import EXIT_STATUS_USER_ERROR, ConfigError, D2ScaleError
from d2scale.launch.elastic import join_machines
from d2scale.launch.machines import Watch, machines_met
from d2scale.launch.topology import (
    Topology,
    address_of,
    number_of_torchrun,
    torchrun_faults,
    under_torchrun,
)
from d2scale.run_folder.files import write_atomically
from d2scale.run_folder.shortages import telling_of_shortages

# The evaluation of a large dataset keeps the other ranks waiting for the first.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# torchrun starts all ranks within seconds; it notices no machine that is gone before they meet.
_MEETING_TIMEOUT = timedelta(minutes=5)
# torchrun counts how often it has started the ranks anew.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_LATER_SECONDS = 1.0
_GLOO_SECONDS = 0.1
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
        return _run_rank_of_torchrun(function, args, use_cuda=use_cuda)
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
    function: Callable[..., Any], args: Sequence[Any], *, use_cuda: bool
) -> Any:
    group = _torchruns_group()
    watch = join_machines(group.store, group.rank, group.world_size)
    result = _run_in_group(function, args, group, use_cuda=use_cuda)
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
        for process in processes:
            process.terminate()
        for process in processes:
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
    try:
        with telling_of_shortages():
            group = _spawned_group(local_rank, topology, folder, use_cuda)
            result = _run_in_group(function, args, group, use_cuda=use_cuda)
            if local_rank == 0:
                (folder / "result").write_bytes(pickle.dumps(result))
    except D2ScaleError as error:
        _hand_over(error, folder / f"{local_rank}.error")
    except Exception:
        # Perhaps only because another rank was killed: the parent shall see that one first.
        time.sleep(_LATER_SECONDS)
        raise


def _hand_over(error: D2ScaleError, path: Path) -> None:
    """End this rank with its error in a file for the parent, or told here if that is refused."""
    try:
        write_atomically(path, pickle.dumps(error))
    except ConfigError:  # there is no room for temporary files
        sys.stderr.writelines(f"d2scale: error: {line}\n" for line in str(error).splitlines())
        sys.exit(EXIT_STATUS_USER_ERROR)
    sys.exit(1)


class _Group(NamedTuple):
    """A rank's place in its process group."""

    store: dist.Store  # where the ranks exchange their addresses
    local_rank: int  # the rank's number on its machine
    rank: int  # its number among all
    world_size: int


def _run_in_group(
    function: Callable[..., Any], args: Sequence[Any], group: _Group, *, use_cuda: bool
) -> Any:
    """Run ``function`` as one rank of a process group."""
    options: dict[str, Any] = {"backend": "gloo"}
    if use_cuda:
        device = torch.device("cuda", _own_gpu(group.local_rank))
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    dist.init_process_group(
        store=group.store,
        rank=group.rank,
        world_size=group.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        **options,
    )
    result = function(*args)
    # Not after an error: the other ranks may be inside a collective. And not at once: gloo's
    # thread may still hold the last operation, and the group waits for it with Python's lock.
    time.sleep(_GLOO_SECONDS)
    dist.destroy_process_group()
    return result


def _own_gpu(local_rank: int) -> int:
    """Return the number of a rank's GPU among those that its process sees."""
    # A cluster that gives each process a GPU of its own shows it that one alone.
    return 0 if torch.cuda.device_count() == 1 else local_rank


def _torchruns_group() -> _Group:
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=_MEETING_TIMEOUT)))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise D2ScaleError(f"the ranks have not all come to {place} ({reason})") from error
    # Its agent may keep one store for all starts, in which a rank could find the address of a
    # rank that was killed. Each machine counts its own restarts, so this is for one machine.
    restarts = os.environ.get(RESTARTS) if os.environ.get("GROUP_WORLD_SIZE") == "1" else None
    store = dist.PrefixStore(f"restart{restarts or 0}", store)
    return _Group(store, number_of_torchrun("LOCAL_RANK", 0), rank, world_size)


def _spawned_group(local_rank: int, topology: Topology, folder: Path, use_cuda: bool) -> _Group:
    rank = topology.machine_rank * topology.num_processes + local_rank
    world_size = topology.world_size
    address = address_of(topology.dist_url)
    if topology.num_machines == 1 or address is None:
        # A file, for another program could meanwhile take a port that is free now.
        file = dist.FileStore(str(folder / "store"), world_size)
        return _Group(file, local_rank, rank, world_size)
    store = dist.TCPStore(*address, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
    return _Group(dist.PrefixStore("ranks", store), local_rank, rank, world_size)


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
