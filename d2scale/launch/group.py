"""A rank's place among all ranks, their process group, and the watch over it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from d2scale.errors import D2ScaleError
from d2scale.launch.network import reason_against
from d2scale.launch.rank_watch import RankWatch
from d2scale.launch.topology import Topology, address_of, number_of_torchrun
from d2scale.step.waiting import exchange

logger = logging.getLogger(__name__)

# A rank's watch says more than gloo and NCCL do, so it comes first.
_AFTER_THE_WATCH = timedelta(minutes=1)
# torchrun starts all ranks within seconds; it notices no machine that is gone before they meet.
_MEETING_TIMEOUT = timedelta(minutes=5)
# torchrun counts how often it has started the ranks anew.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_TOLD_AFTER_SECONDS = 5.0
_GLOO_SECONDS = 0.1


class Group(NamedTuple):
    """A rank's place in its process group."""

    store: dist.Store  # where the ranks exchange their addresses
    watch_store: dist.Store  # another way to it, or another one, for the watch
    local_rank: int  # the rank's number on its machine
    rank: int  # its number among all
    world_size: int


def watch_ranks(group: Group, topology: Topology, give_up: Callable[[D2ScaleError], None]) -> None:
    """Tell from now on which rank keeps this one waiting; ``give_up`` ends this process."""
    store = dist.PrefixStore("waiting", group.watch_store)
    places = (group.rank, group.local_rank, group.world_size)
    RankWatch(store, *places, topology.rank_timeout, give_up).start()


def run_in_group(
    function: Callable[..., Any],
    args: Sequence[Any],
    group: Group,
    topology: Topology,
    *,
    use_cuda: bool,
) -> Any:
    """Run ``function`` as one rank of a process group."""
    options: dict[str, Any] = {"backend": "gloo"}
    if use_cuda:
        device = torch.device("cuda", _own_gpu(group.local_rank))
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    with exchange():
        dist.init_process_group(
            store=group.store,
            rank=group.rank,
            world_size=group.world_size,
            timeout=_collective_timeout(topology),
            **options,
        )
    result = function(*args)
    # Not after an error: the other ranks may be inside a collective. And not at once: gloo's
    # thread may still hold the last operation, and the group waits for it with Python's lock.
    time.sleep(_GLOO_SECONDS)
    dist.destroy_process_group()
    return result


def _collective_timeout(topology: Topology) -> timedelta:
    return timedelta(seconds=topology.rank_timeout) + _AFTER_THE_WATCH


def _own_gpu(local_rank: int) -> int:
    """Return the number of a rank's GPU among those that its process sees."""
    # A cluster that gives each process a GPU of its own shows it that one alone.
    return 0 if torch.cuda.device_count() == 1 else local_rank


def torchruns_group() -> Group:
    """Return this rank's place among those that torchrun has started; waits for all of them."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    place = "{}:{}".format(*address)
    if number_of_torchrun("RANK", 0) != 0:
        _wait_for_store(address, place)
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=_MEETING_TIMEOUT)))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise D2ScaleError(f"the ranks have not all come to {place} ({reason})") from error
    # Its agent may keep one store for all starts, in which a rank could find the address of a
    # rank that was killed. Each machine counts its own restarts, so this is for one machine.
    restarts = os.environ.get(RESTARTS) if os.environ.get("GROUP_WORLD_SIZE") == "1" else None
    prefix, local_rank = f"restart{restarts or 0}", number_of_torchrun("LOCAL_RANK", 0)
    other = dist.TCPStore(*address, timeout=_MEETING_TIMEOUT, wait_for_workers=False)
    stores = dist.PrefixStore(prefix, store), dist.PrefixStore(prefix, other)
    return Group(*stores, local_rank, rank, world_size)


def _wait_for_store(address: tuple[str, int], place: str) -> None:
    """Wait until rank 0 answers, or torchrun; torch would print frames of C++ meanwhile."""
    began = time.monotonic()
    told = False
    while reason := reason_against(address):
        waited = time.monotonic() - began
        if waited > _MEETING_TIMEOUT.total_seconds():
            raise D2ScaleError(f"the ranks have not all come to {place} ({reason})")
        if waited > _TOLD_AFTER_SECONDS and not told:
            logger.warning("waiting for rank 0 at %s (%s)", place, reason)
            told = True
        time.sleep(_GLOO_SECONDS)


def spawned_group(local_rank: int, topology: Topology, folder: Path) -> Group:
    """Return the place of a rank that ``launch`` has started; ``folder`` is its machine's."""
    rank = topology.machine_rank * topology.num_processes + local_rank
    world_size = topology.world_size
    address = address_of(topology.dist_url)
    if topology.num_machines == 1 or address is None:
        # A file, for another program could meanwhile take a port that is free now.
        files = (dist.FileStore(str(folder / name), world_size) for name in ("store", "watch"))
        return Group(next(files), next(files), local_rank, rank, world_size)
    store, other = (
        dist.TCPStore(*address, timeout=_collective_timeout(topology), wait_for_workers=False)
        for _ in range(2)
    )
    stores = dist.PrefixStore("ranks", store), dist.PrefixStore("watch", other)
    return Group(*stores, local_rank, rank, world_size)
