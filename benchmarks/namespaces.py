"""Network namespaces as the machines of a cluster: own addresses, own processes, own end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_CLUSTERS = itertools.count()


# Starts a command under a name of its own, whose address is what another file of hosts says.
_NAMED = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def ip(*words: str) -> str:
    """Run ``ip``; OSError with its words if it fails."""
    command = ["ip", *words]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  no shell
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


class Machine:
    """One namespace, joined to the others of its cluster by a cable into their bridge.

    ``environment`` are variables for all that is started here.
    """

    def __init__(self, name: str, hub: str, address: str, environment: Mapping[str, str]) -> None:
        self.name, self.hub, self.address = name, hub, address
        self.environment = dict(environment)
        self.hosts: Path | None = None  # a file like /etc/hosts: then its name is ``host_name``
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def host_name(self) -> str:
        """Its own name, where it has ``hosts``."""
        return f"host-{self.address.rpartition('.')[2]}"

    def plug_in(self) -> None:
        port = f"port{self.address.rpartition('.')[2]}"
        ends = ("eth0", "netns", self.name, "type", "veth", "peer", port, "netns", self.hub)
        ip("link", "add", *ends)
        ip("-n", self.hub, "link", "set", port, "master", "bridge", "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", "eth0", "up")

    def cut_off(self) -> None:
        """Pull the cable: nobody is told of anything."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def start(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command of Python here; all that it says goes to the end of ``log``."""
        inherited = {key: text for key, text in os.environ.items() if "SOCKET_IFNAME" not in key}
        variables = {**inherited, "OMP_NUM_THREADS": "1", **self.environment, **environment}
        named = ["unshare", "--mount", "--uts", "sh", "-c", _NAMED, self.host_name, str(self.hosts)]
        words = ["ip", "netns", "exec", self.name, *(named if self.hosts else [])]
        words += [sys.executable, *command]
        with log.open("a") as file:
            process = subprocess.Popen(  # noqa: S603  no shell
                words, stdout=file, stderr=file, env=variables
            )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """End every process here, without a word."""
        # Again, for one may be starting another.
        while self.signal(signal.SIGKILL):
            pass
        for process in self.started:
            process.wait()

    def signal(self, number: int) -> int:
        """Send a signal to every process here; return how many there are."""
        pids = ip("netns", "pids", self.name).split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)
        return len(pids)


@contextmanager
def cluster(size: int, **environment: str) -> Iterator[list[Machine]]:
    """Machines on one bridge; OSError where namespaces are not permitted."""
    name = f"d2scale-{os.getpid()}-{next(_CLUSTERS)}"
    hub = f"{name}-hub"
    addresses = [f"198.18.0.{number}" for number in range(1, size + 1)]
    machines = [Machine(f"{name}-{a[9:]}", hub, a, environment) for a in addresses]
    try:
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for machine in machines:
            ip("netns", "add", machine.name)
            machine.plug_in()
        yield machines
    finally:
        for machine in machines:
            with suppress(OSError):
                machine.kill()
                ip("netns", "delete", machine.name)
        with suppress(OSError):
            ip("netns", "delete", hub)
