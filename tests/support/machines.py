"""Network namespaces as the machines of a cluster: own addresses, own processes, own end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent
_CLUSTERS = itertools.count()


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


class Machine:
    """One namespace, joined to the others of its cluster by a cable into their bridge."""

    def __init__(self, name: str, hub: str, address: str) -> None:
        self.name, self.hub, self.address = name, hub, address
        self.started: list[subprocess.Popen] = []

    def plug_in(self) -> None:
        port = f"port{self.address.rpartition('.')[2]}"
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            self.name,
            "type",
            "veth",
            "peer",
            port,
            "netns",
            self.hub,
        )
        ip("-n", self.hub, "link", "set", port, "master", "bridge", "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", "eth0", "up")

    def cut_off(self) -> None:
        """Pull the cable: nobody is told of anything."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def start(self, *command: str, log: Path, **environment: str) -> subprocess.Popen:
        """Start a command of Python here; all that it says goes to the end of ``log``."""
        inherited = {key: text for key, text in os.environ.items() if "SOCKET_IFNAME" not in key}
        variables = {**inherited, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", **environment}
        words = ["ip", "netns", "exec", self.name, sys.executable, *command]
        with log.open("a") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, env=variables)
        self.started.append(process)
        return process

    def kill(self) -> None:
        """End every process here, without a word."""
        # Again, for one may be starting another.
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait()


@contextmanager
def cluster(size: int) -> Iterator[list[Machine]]:
    """Machines on one bridge; the test is skipped where namespaces are not permitted."""
    name = f"d2scale-{os.getpid()}-{next(_CLUSTERS)}"
    hub = f"{name}-hub"
    machines = [Machine(f"{name}-{i}", hub, f"198.18.0.{i + 1}") for i in range(size)]
    try:
        try:
            ip("netns", "add", hub)
            ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            ip("-n", hub, "link", "set", "bridge", "up")
            for machine in machines:
                ip("netns", "add", machine.name)
                machine.plug_in()
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield machines
    finally:
        for machine in machines:
            with suppress(OSError):
                machine.kill()
                ip("netns", "delete", machine.name)
        with suppress(OSError):
            ip("netns", "delete", hub)
