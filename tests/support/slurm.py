"""A SLURM cluster of two nodes on this machine, of Debian's packages, for one test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=d2scale-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Its commands, which find it by ``SLURM_CONF``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **environment: str) -> str:
        variables = {**self.environment, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def said(self) -> str:
        """The last words of its daemons."""
        return "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.log")))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start it, and end it with everything that runs on it; skips where it cannot be started."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs SLURM (Debian: slurm-wlm, munge): no {', '.join(missing)}")
    host = socket.gethostname().partition(".")[0]
    user = os.environ.get("USER", "root") if os.getuid() else "root"
    text = CONFIG.format(host=host, user=user, folder=folder, ports=_free_ports(3))
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
    daemons = [
        ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files),
        ("slurmctld", "-D"),
        ("slurmd", "-D", "-N", "first"),
        ("slurmd", "-D", "-N", "second"),
    ]
    cluster, started = Cluster(folder), []
    try:
        for number, words in enumerate(daemons):
            with (folder / f"{number}-{words[0]}.log").open("w") as log:
                started.append(
                    subprocess.Popen(words, stdout=log, stderr=log, env=cluster.environment)
                )
            time.sleep(0.5)
        _await_nodes(cluster)
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user", user)
            _await_end_of_jobs(cluster)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def _await_nodes(cluster: Cluster) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done = subprocess.run(
            ("sinfo", "--noheader", "--format=%T"),
            env=cluster.environment,
            capture_output=True,
            text=True,
        )
        if done.stdout.split() == ["idle"]:
            return
        time.sleep(0.5)
    pytest.skip(f"no SLURM cluster could be started here: {cluster.said()}")


def _await_end_of_jobs(cluster: Cluster) -> None:
    end = time.monotonic() + 30
    while cluster.run("squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.2)
