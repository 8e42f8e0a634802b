"""Machines that come late, never, or go: namespaces of this one stand for them."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from d2scale.errors import ConfigError, D2ScaleError
from d2scale.launch import machines
from d2scale.launch.launch import Topology, launch
from d2scale.launch.network import interface_towards, use_route_to
from machines import cluster
from rank_functions import user_error_on

# What every machine starts: its number and the URL of machine 0 follow.
JOB = """
import sys
import time
import torch.distributed as dist
from d2scale.errors import D2ScaleError
from d2scale.launch import elastic, machines
from d2scale.launch.launch import Topology, launch

def exchange_for_ever(marker):
    while True:
        dist.barrier()
        open(f"{marker}.{dist.get_rank()}", "w").close()
        time.sleep(0.1)

machines.SILENT_AFTER_SECONDS = elastic.SILENT_AFTER_SECONDS = 6
machines.SILENT_AFTER_ERROR_SECONDS = 4
if __name__ == "__main__":
    number, url, marker = sys.argv[1:]
    try:
        launch(exchange_for_ever, [marker], Topology(1, 2, int(number), url))
    except D2ScaleError as error:
        sys.exit(f"error: {error}")
"""


@pytest.fixture
def start(tmp_path):
    job = tmp_path / "job.py"
    job.write_text(JOB)

    def start(machine, number, url, **environment):
        log = tmp_path / f"log{number}"
        words = (str(job), str(number), url, str(tmp_path / "met"))
        return machine.start(*words, log=log, **environment), log

    return start


def wait_for(condition, what):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, what()
        assert "Traceback" not in what(), what()
        time.sleep(0.05)


@pytest.mark.parametrize("accident", ["kill", "cut_off"])
def test_machines_wait_and_miss_each_other(start, tmp_path, accident):
    """Each machine's own name leads nowhere here, as with a name that has a loopback address."""
    with cluster(2) as machines:
        url = f"tcp://{machines[0].address}:29400"
        late = 1 if accident == "kill" else 0
        early, said = start(machines[1 - late], 1 - late, url)
        waiting = f"waiting for machine {late} of 2 at {url}"
        wait_for(lambda: waiting in said.read_text(), said.read_text)
        start(machines[late], late, url)
        wait_for(lambda: len(list(tmp_path.glob("met.*"))) == 2, said.read_text)
        getattr(machines[late], accident)()
        started = time.monotonic()
        assert early.wait(timeout=60) == 1
        assert time.monotonic() - started < 60
        assert "Traceback" not in said.read_text()
        line = said.read_text().splitlines()[-1]
        assert re.match(rf"error: machine {late} of 2 has not been heard of for \d+ s", line)


def test_a_rank_of_torchrun_misses_a_machine(start, tmp_path):
    """It ends, so that torchrun starts the ranks of the others anew."""
    with cluster(2) as machines:
        address = machines[0].address
        for number, machine in enumerate(machines):
            rank = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            group = {"GROUP_RANK": str(number), "GROUP_WORLD_SIZE": "2"}
            place = {"MASTER_ADDR": address, "MASTER_PORT": "29400"}
            process, said = start(machine, number, "", **rank, **group, **place)
        wait_for(lambda: len(list(tmp_path.glob("met.*"))) == 2, said.read_text)
        machines[0].cut_off()
        assert process.wait(timeout=60) == 1
        assert "machine 0 of 2 has not been heard of for 6 s" in said.read_text()


def free_url():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"tcp://localhost:{free.getsockname()[1]}"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_machine_that_never_comes(missing, caplog):
    url = free_url()
    with pytest.raises(D2ScaleError, match="--join-timeout") as caught:
        launch(torch.get_num_threads, topology=Topology(1, 2, 1 - missing, url, join_timeout=3.5))
    assert str(caught.value).startswith(f"waited 3.5 s for machine {missing} of 2 at {url} (")
    assert "\n" not in str(caught.value)
    assert f"waiting for machine {missing} of 2 at {url}" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["join", "rank"])
def test_timeouts_that_cannot_be_are_refused(name, seconds):
    with pytest.raises(ConfigError, match=rf"--{name}-timeout is {seconds}; allowed: more than 0"):
        launch(torch.get_num_threads, topology=Topology(2, **{f"{name}_timeout": seconds}))


def test_a_machine_says_why_it_ends(one_thread):
    """A mistake that only machine 1 meets is the reason that machine 0 gives."""
    url = free_url()

    def run(number):
        try:
            launch(user_error_on, [1], Topology(1, 2, number, url))
        except D2ScaleError as error:
            return str(error)

    with ThreadPoolExecutor() as machines:
        first, second = machines.map(run, [0, 1])
    assert second.startswith("image is 'a.jpg'")
    assert first == f"machine 1 of 2 has ended: {second}"


@pytest.mark.parametrize(
    ("variable", "interface"), [("GLOO_SOCKET_IFNAME", "ib0"), ("NCCL_SOCKET_IFNAME", "=ib0")]
)
def test_gloo_and_nccl_are_told_of_the_route_unless_the_user_has_decided(
    monkeypatch, route_table, variable, interface
):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "chosen")
    use_route_to(["198.18.0.1"])
    assert os.environ[variable] == "chosen"
    monkeypatch.delenv(variable)
    use_route_to(["localhost"])
    assert variable not in os.environ
    use_route_to(["localhost", "198.18.0.1"])
    assert os.environ[variable] == interface


@pytest.mark.parametrize(
    ("host", "interface"),
    [("198.18.0.7", "ib0"), ("198.19.0.7", "eth0"), ("127.0.1.1", None), ("host.invalid", None)],
)
def test_the_narrowest_route_decides(route_table, host, interface):
    assert interface_towards([host]) == interface


@pytest.fixture
def route_table(tmp_path, monkeypatch):
    """A default route and a narrower one, as Linux lists them."""

    def in_hex(address):
        return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}"

    rows = [
        ("wlan0", in_hex("0.0.0.0"), "0", "0003", "0", "0", "600", in_hex("0.0.0.0")),
        ("ib0", in_hex("198.18.0.0"), "0", "0001", "0", "0", "100", in_hex("255.255.0.0")),
        ("eth0", in_hex("0.0.0.0"), "0", "0003", "0", "0", "100", in_hex("0.0.0.0")),
    ]
    table = tmp_path / "route"
    table.write_text("\n".join(["Iface ...", *("\t".join(row) for row in rows)]))
    monkeypatch.setattr("d2scale.launch.network._ROUTES", table)


def test_what_ended_a_machine_ends_this_one_only_after_a_while(monkeypatch):
    store = torch.distributed.HashStore()
    watch = machines.Watch(store, Topology(num_machines=2))
    store.set("alive1", "ended: --method on rank 1 is 'per_gpu'")
    time.sleep(2.5)
    # Its own ranks may have met the same mistake, and have more to say.
    assert watch.loss() is None
    monkeypatch.setattr(machines, "_OWN_END_SECONDS", 0.5)
    assert str(watch.loss()) == "machine 1 of 2 has ended: --method on rank 1 is 'per_gpu'"
    watch.leave()
