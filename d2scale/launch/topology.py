"""The processes and machines of a run, as the command line or torchrun names them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from d2scale.errors import Fault

_LONGEST_SECONDS = 7 * 24 * 3600
_LAST_PORT, _MOST = 2**16 - 1, 2**31 - 1


def under_torchrun() -> bool:
    """Return whether torchrun has started this process, as one rank of a run."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def number_of_torchrun(name: str, otherwise: int) -> int:
    """Return the number in a variable of torchrun; ``otherwise`` if it is not set or holds none."""
    try:
        return int(os.environ.get(name, otherwise))
    except ValueError:
        return otherwise


def torchrun_faults() -> list[Fault]:
    """Return what is wrong with the variables by which torchrun tells a rank its place."""
    if "RANK" not in os.environ:
        return []
    # A wrong number of ranks says nothing about the number of this one.
    world_size, local_ranks = (
        number if (number := number_of_torchrun(name, _MOST)) > 0 else _MOST
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    bounds = {
        "RANK": (0, world_size - 1),
        "WORLD_SIZE": (1, _MOST),
        "MASTER_PORT": (1, _LAST_PORT),
        "LOCAL_RANK": (0, local_ranks - 1),
        "LOCAL_WORLD_SIZE": (1, _MOST),
        "GROUP_RANK": (0, _MOST),
        "GROUP_WORLD_SIZE": (1, _MOST),
        "TORCHELASTIC_MAX_RESTARTS": (0, _MOST),
        "TORCHELASTIC_RESTART_COUNT": (0, _MOST),
    }
    needed = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    allowed = {
        name: f"a number, {least} to {most}"
        for name, (least, most) in bounds.items()
        if name in needed or name in os.environ
        if not least <= number_of_torchrun(name, least - 1) <= most
    }
    if not os.environ.get("MASTER_ADDR"):
        allowed["MASTER_ADDR"] = "the address of rank 0"
    advice = "let torchrun set it, or unset RANK to train without torchrun"
    return [Fault(n, os.environ.get(n, "not set"), text, advice) for n, text in allowed.items()]


@dataclass(frozen=True)
class Topology:
    """The processes and machines of a run."""

    num_processes: int = 1  # on this machine, one to a GPU; under torchrun its ranks are used
    num_machines: int = 1  # on all of which the same command is started
    machine_rank: int = 0  # number of this machine, from 0
    dist_url: str = "auto"  # tcp://HOST:PORT of machine 0; auto on a single machine
    join_timeout: float = 600  # seconds for which the machines wait for each other
    # Seconds for which ranks wait for one of them. Evaluation keeps all waiting for the first.
    rank_timeout: float = 1800

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        if under_torchrun():
            return number_of_torchrun("WORLD_SIZE", 1)
        return self.num_processes * self.num_machines

    def faults(self, gpus: int | None = None) -> list[Fault]:
        """Return what makes it impossible to start ranks on ``gpus``; None: they need no GPU."""
        processes = self.num_processes
        faults = torchrun_faults()
        if under_torchrun():
            processes = max(1, number_of_torchrun("LOCAL_WORLD_SIZE", 1))
        for option, value in (("--num-gpus", processes), ("--num-machines", self.num_machines)):
            if value < 1:
                faults.append(Fault(option, value, "1 or more", "correct it"))
        if gpus is not None and processes > gpus:
            allowed = f"at most {gpus}, the GPUs of this machine"
            advice = "use fewer, or set MODEL.DEVICE to cpu"
            faults.append(Fault("--num-gpus", processes, allowed, advice))
        if not 0 <= self.machine_rank < max(1, self.num_machines):
            allowed = f"0 to {self.num_machines - 1}"
            faults.append(Fault("--machine-rank", self.machine_rank, allowed, "number from 0"))
        timeouts = (("--join-timeout", self.join_timeout), ("--rank-timeout", self.rank_timeout))
        for option, seconds in timeouts:
            if not 0 < seconds <= _LONGEST_SECONDS:
                allowed = f"more than 0, at most {_LONGEST_SECONDS}"
                faults.append(Fault(option, seconds, allowed, "give seconds"))
        needs_no_url = self.num_machines == 1 and self.dist_url == "auto"
        if not needs_no_url and address_of(self.dist_url) is None:
            faults.append(url_fault(self.dist_url))
        return faults


def address_of(url: str) -> tuple[str, int] | None:
    """Return host and port of ``tcp://HOST:PORT``; None for anything else."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:  # a port that is no number
        pass
    return None


def url_fault(url: str, reason: str = "") -> Fault:
    allowed = "tcp://HOST:PORT, or auto on a single machine"
    advice = "give the address of machine 0 and a port that is free there"
    return Fault("--dist-url", url, allowed, f"{advice} ({reason})" if reason else advice)
