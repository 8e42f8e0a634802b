"""Starting the ranks of a run with torch's elastic launcher, and bringing their errors back."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from d2scale.errors import ConfigError, D2ScaleError, Fault

# The evaluation of a large dataset keeps the other ranks waiting for the first.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# torchrun counts how often it has started the ranks anew.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_ECHO_SECONDS = 1.0
_GLOO_SECONDS = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NOISY_LOGGERS = (
    "torch.distributed.elastic",
    "torch.multiprocessing",
    "torch.distributed.launcher",
)


@dataclass(frozen=True)
class Topology:
    """The processes that a run shall have, as the command line names them.

    Attributes:
        num_processes: ranks on this machine, one to a GPU. Under torchrun its ranks are used.
        num_machines: machines, on all of which the same command is started.
        machine_rank: number of this machine, from 0.
        dist_url: ``tcp://HOST:PORT`` of machine 0; ``auto`` finds a port on a single machine.
    """

    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"

    @property
    def world_size(self) -> int:
        """Ranks of the whole run: torchrun's, if it started this process."""
        if under_torchrun():
            return int(os.environ["WORLD_SIZE"])
        return self.num_processes * self.num_machines

    def faults(self, gpus: int | None = None) -> list[Fault]:
        """Return what makes it impossible to start the ranks.

        Args:
            gpus: of this machine; None: a rank needs none.
        """
        processes = self.num_processes
        if under_torchrun():
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        faults = []
        for option, value in (("--num-gpus", processes), ("--num-machines", self.num_machines)):
            if value < 1:
                faults.append(Fault(option, value, "1 or more", "correct it"))
        if gpus is not None and processes > gpus:
            allowed = f"at most {gpus}, the GPUs of this machine"
            advice = "use fewer, or set MODEL.DEVICE to cpu"
            faults.append(Fault("--num-gpus", processes, allowed, advice))
        return faults + self._address_faults()

    def _address_faults(self) -> list[Fault]:
        faults = []
        try:
            if self.dist_url != "auto":
                _endpoint(self.dist_url)
            elif self.num_machines > 1:
                faults.append(_url_fault(self.dist_url))
        except ConfigError as error:
            faults += error.faults
        if not 0 <= self.machine_rank < max(1, self.num_machines):
            allowed = f"0 to {self.num_machines - 1}"
            faults.append(Fault("--machine-rank", self.machine_rank, allowed, "number from 0"))
        return faults


class RankError(RuntimeError):
    """A rank ended by a fault of the program; the text is its traceback."""


def under_torchrun() -> bool:
    """Return whether this process is a rank that someone else has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    topology: Topology | None = None,
    *,
    use_cuda: bool | None = None,
) -> Any:
    """Run ``function(*args)`` on every rank and return what the first rank here returned.

    One process on one machine runs in place, without a process group. Under torchrun the
    ranks exist already: each call runs its own. Otherwise ranks are spawned, so ``function``
    must be importable and ``args`` must pickle.

    Args:
        function: finds its process group initialised (nccl with CUDA, gloo without) and, with
            CUDA, its device set.
        args: its arguments.
        topology: the processes; None: one.
        use_cuda: one GPU to a rank; None: if CUDA is there.

    Raises:
        D2ScaleError: what a rank raised, or a rank that was killed.
        RankError: any other error of a rank.
        KeyboardInterrupt: Ctrl-C, after all ranks have ended.
    """
    topology = topology or Topology()
    use_cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
    if under_torchrun():
        return _run_in_group(function, args, use_cuda)
    if topology.world_size == 1:
        return function(*args)
    faults = topology.faults()
    if faults:
        raise ConfigError(faults)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="d2scale-"))
        config = _launch_config(topology, folder)
        stack.enter_context(_quiet_loggers())
        stack.enter_context(_signal_handlers_kept())
        stack.enter_context(_threads_divided(topology.num_processes))
        try:
            results = elastic_launch(config, _run_rank)(function, tuple(args), use_cuda, folder)
        except ChildFailedError as error:
            raise _error_of_ranks(Path(folder), error) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
    return results[min(results)]


def _launch_config(topology: Topology, folder: str) -> LaunchConfig:
    common: dict[str, Any] = {
        "min_nodes": topology.num_machines,
        "max_nodes": topology.num_machines,
        "nproc_per_node": topology.num_processes,
        "max_restarts": 0,
        "start_method": "spawn",
        "logs_specs": DefaultLogsSpecs(log_dir=folder),
    }
    url = topology.dist_url
    if topology.num_machines == 1:
        return LaunchConfig(
            **common,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=_endpoint(url) if topology.dist_url != "auto" else "localhost:0",
            # A laptop's own host name need not resolve.
            local_addr="localhost",
        )
    return LaunchConfig(
        **common,
        run_id="d2scale",
        rdzv_backend="static",
        rdzv_endpoint=_endpoint(url),
        rdzv_configs={"rank": topology.machine_rank, "timeout": 900},
    )


def _url_fault(dist_url: str) -> Fault:
    return Fault(
        "--dist-url",
        dist_url,
        "tcp://HOST:PORT, or auto on a single machine",
        "give the address of machine 0 and a port that is free there",
    )


def _endpoint(dist_url: str) -> str:
    """``tcp://HOST:PORT`` without its scheme."""
    try:
        parts = urlsplit(dist_url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.netloc
    except ValueError:  # a port that is no number
        pass
    raise ConfigError([_url_fault(dist_url)])


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], use_cuda: bool, folder: str
) -> Any:
    """Entry of a spawned rank: its error goes to ``folder``, not to the terminal."""
    # Ctrl-C reaches every process of a terminal: end at once, wherever a collective hangs.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _run_in_group(function, args, use_cuda)
    except Exception as error:
        content = error if isinstance(error, D2ScaleError) else traceback.format_exc()
        _write_error(Path(folder), int(os.environ["RANK"]), content)
        if not isinstance(error, D2ScaleError):
            # Perhaps only the echo of a rank that was killed: the launcher shall see that first.
            time.sleep(_ECHO_SECONDS)
        sys.exit(1)


def _run_in_group(function: Callable[..., Any], args: Sequence[Any], use_cuda: bool) -> Any:
    """Run ``function`` inside the process group that the environment describes."""
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device, **_meeting_place()
        )
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT, **_meeting_place())
    result = function(*args)
    # Not after an error: the other ranks may be inside a collective. And not at once: gloo's
    # thread may still hold the last operation, and the group waits for it with Python's lock.
    time.sleep(_GLOO_SECONDS)
    dist.destroy_process_group()
    return result


def _meeting_place() -> dict[str, Any]:
    """Where ranks that torchrun has started again meet: not where the dead ones did.

    Its agent may keep one store for all starts, in which a rank could find the address of a
    rank that was killed. Each machine counts its own restarts, so this is for one machine.
    """
    restarts = os.environ.get(RESTARTS, "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, number, ranks = next(iter(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
    store = dist.PrefixStore(f"restart{restarts}", store)
    return {"store": store, "rank": number, "world_size": ranks}


def _write_error(folder: Path, rank: int, content: D2ScaleError | str) -> None:
    partial = folder / f"rank{rank}.partial"
    partial.write_bytes(pickle.dumps(content))
    partial.rename(folder / f"rank{rank}.error")


def _error_of_ranks(folder: Path, failed: ChildFailedError) -> Exception:
    """The first mistake of the user that a rank met, or else the first fault of the program."""
    files = sorted(folder.glob("rank*.error"), key=lambda path: path.stat().st_mtime_ns)
    # The folder is private to this process and the ranks that it started.
    found = [(path.stem, pickle.loads(path.read_bytes())) for path in files]  # noqa: S301
    for _, content in found:
        if isinstance(content, D2ScaleError):
            return content
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        return _killed(rank, signal.Signals(-failure.exitcode).name)
    if found:
        name, text = found[0]
        return RankError(f"{name} failed:\n{text}")
    return RankError(f"rank {rank} ended with exit status {failure.exitcode}")


def _killed(rank: int, signal_name: str) -> D2ScaleError:
    cause = ""
    if signal_name == "SIGKILL":
        cause = "; the system does that when the machine runs out of memory"
    return D2ScaleError(f"rank {rank} was ended from outside by {signal_name}{cause}")


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Keep the launcher from reporting again, and at length, what ``launch`` raises."""
    # Each of torch's loggers has a level of its own, so a parent's would not do.
    known = [name for name in logging.root.manager.loggerDict if name.startswith(_NOISY_LOGGERS)]
    loggers = [logging.getLogger(name) for name in known]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers that the launcher replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Cores that this process may use; all of the machine's where that cannot be asked."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _threads_divided(num_processes: int) -> Iterator[None]:
    """Give each rank its part of the cores, unless the user has decided."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, _cores() // num_processes))
    try:
        yield
    finally:
        del os.environ[name]
