"""A run whose machines may come and go: torchrun starts the ranks of those that are there anew."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from d2scale.errors import ConfigError, D2ScaleError, Fault
from d2scale.launch.machines import Watch
from d2scale.launch.network import own_address, use_route_to
from d2scale.launch.topology import Topology, number_of_torchrun, under_torchrun
from d2scale.run_folder.lock import lock_holder
from d2scale.step import ranks

logger = logging.getLogger(__name__)

_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# A network file system may show for so long what a folder held before.
_STALE_SECONDS = 60.0
# A rank that reads a large file of annotations is silent for a while: Python's lock is taken.
SILENT_AFTER_SECONDS = 60.0


def may_start_anew() -> bool:
    """Return whether torchrun was told to start the ranks of this run anew (``--max-restarts``).

    Its count of restarts does not say whether this is the first start: every machine counts its
    own, and none counts a machine that came.
    """
    return under_torchrun() and number_of_torchrun("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def machines_of_torchrun() -> Topology:
    """Return the machines of now, and which of them this is."""
    machines = number_of_torchrun("GROUP_WORLD_SIZE", 1)
    return Topology(num_machines=machines, machine_rank=number_of_torchrun("GROUP_RANK", 0))


def store_faults() -> list[Fault]:
    """Return what would keep the ranks of several machines from meeting a second time.

    Otherwise torch serves one store for all starts, perhaps on a machine that has gone, and does
    not tell a machine that comes where it is.
    """
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (may_start_anew() and shares and machines_of_torchrun().num_machines > 1):
        return []
    value = os.environ.get(_OWN_STORE, "not set")
    allowed = "1 where --max-restarts is for several machines"
    advice = "export it on each of them, and give torchrun --rdzv-backend c10d"
    return [Fault(_OWN_STORE, value, allowed, advice)]


def join_machines(store: dist.Store, rank: int, world_size: int) -> Watch | None:
    """Let torchrun's ranks use the route between its machines, and end with a machine that is lost.

    Returns the watch of this machine, which its first rank keeps; None on the others.
    """
    topology = machines_of_torchrun()
    if topology.num_machines == 1:
        return None
    host = os.environ["MASTER_ADDR"]
    store.set(f"address{rank}", own_address(host) or "")
    addresses = [store.get(f"address{number}").decode() for number in range(world_size)]
    use_route_to([host, *filter(None, addresses)])
    if number_of_torchrun("LOCAL_RANK", 0) != 0:
        return None
    watch = Watch(dist.PrefixStore("machines", store), topology)
    threading.Thread(target=_end_with_a_loss, args=[watch], daemon=True).start()
    return watch


def _end_with_a_loss(watch: Watch) -> None:
    while not (loss := watch.loss(SILENT_AFTER_SECONDS)):
        time.sleep(1)
    end_with(loss)


def end_with(loss: D2ScaleError) -> None:
    """End this process at once: its rank may wait in a collective call for ever."""
    logger.error("%s", loss)
    os._exit(1)


def refuse_separate_folders(folder: Path) -> None:
    """Raise on all ranks if a run that may start anew has not one folder on all its machines.

    Rank 0 holds the lock of its folder. Any other machine may have to go on without that one.
    """
    if not may_start_anew():
        return
    holder = ranks.broadcast_object(lock_holder(folder))
    until = time.monotonic() + _STALE_SECONDS
    while (sees_it := lock_holder(folder) == holder) is False and time.monotonic() < until:
        time.sleep(1)
    if not all(ranks.gather_objects(sees_it)):
        allowed = "one folder for all machines, since --max-restarts may leave out any of them"
        advice = "use a file system that all of them share, or leave --max-restarts out"
        raise ConfigError([Fault("OUTPUT_DIR", str(folder), allowed, advice)])
