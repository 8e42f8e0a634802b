from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from d2scale.errors import ConfigError, D2ScaleError, DataError
from d2scale.launch import network
from d2scale.launch.elastic import may_start_anew, store_faults
from d2scale.launch.group import _own_gpu
from d2scale.launch.launch import RankError, Topology, launch
from rank_functions import (
    killed_on,
    program_error,
    sleep_for_ever,
    stopped_on,
    user_error_on,
    where_am_i,
)

SUPPORT = Path(__file__).parents[1] / "support"


def test_one_process_runs_in_place():
    assert launch(os.getpid) == os.getpid()


def test_ranks_have_a_group_and_their_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = launch(where_am_i, ["a", 1], Topology(2))
    cores = len(os.sched_getaffinity(0))
    assert found == {
        "args": ("a", 1),
        "rank": 0,
        "world_size": 2,
        "backend": "gloo",
        "threads": max(1, cores // 2),
    }
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("rank", [0, 1])
def test_mistake_of_the_user_comes_back_as_it_was(rank, capfd):
    with pytest.raises(DataError, match=r"^image is 'a\.jpg'") as caught:
        launch(user_error_on, [rank], Topology(2))
    assert caught.value.faults[0].advice == "mend it"
    assert capfd.readouterr().err == ""


def test_fault_of_the_program_comes_back_with_its_traceback(capfd):
    with pytest.raises(RankError, match="ZeroDivisionError: a fault of the program"):
        launch(program_error, topology=Topology(2))
    assert capfd.readouterr().err == ""


def test_killed_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(D2ScaleError, match="rank 1 was ended from outside by SIGKILL"):
        launch(killed_on, [1], Topology(2))
    assert time.monotonic() - start < 60


def test_a_rank_that_hangs_is_named_and_ended(tmp_path, capfd):
    """It is stopped, so that it does not answer to SIGTERM either."""
    error = "^rank 0 of 2 kept rank 1 waiting for 4 s: .* --rank-timeout; --resume goes on"
    with pytest.raises(D2ScaleError, match=error):
        launch(stopped_on, [0, str(tmp_path / "pid")], Topology(2, rank_timeout=4))
    told = r"d2scale: waiting for rank 0 of 2 for \d s, until 4 s \(--rank-timeout\)"
    assert re.search(told, capfd.readouterr().err)
    assert not any(map(is_running, pids_in(tmp_path)))


def test_interrupt_ends_all_ranks_quietly(tmp_path, capfd):
    marker = str(tmp_path / "pid")

    def interrupt_when_started():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_started, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(sleep_for_ever, [marker], Topology(2))
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert capfd.readouterr().err == ""


def test_an_interrupt_while_ranks_start_is_quiet(tmp_path):
    """Ctrl-C reaches all processes of a terminal, so also ranks that still import torch."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from d2scale.launch.launch import Topology, launch\n"
        "if __name__ == '__mp_main__':\n"
        f"    Path(r'{tmp_path}', f'pid.{{os.getpid()}}').write_text(str(os.getpid()))\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the launcher ends them\n"
        "    time.sleep(3)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        launch(time.sleep, [1000], Topology(2))\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit('interrupted')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: len(pids_in(tmp_path)) == 2)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=60)[1] == "interrupted\n"
    finally:
        parent.kill()
    assert not any(map(is_running, pids_in(tmp_path)))


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "from d2scale.launch.launch import Topology, launch\n"
        "from rank_functions import sleep_for_ever\n"
        "if __name__ == '__main__':\n"
        f"    launch(sleep_for_ever, [r'{tmp_path}/pid'], Topology(2))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(SUPPORT)}
    )
    try:
        ranks = wait_for(lambda: pids_in(tmp_path) if len(pids_in(tmp_path)) == 2 else None)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(is_running, ranks)))


def test_ranks_end_with_a_parent_that_was_killed_before_they_had_imported_torch(tmp_path):
    """torch tells a rank of its parent's death only if that comes later."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "if __name__ == '__mp_main__':\n"
        "    parent = os.getppid()\n"
        f"    Path(r'{tmp_path}', f'pid.{{os.getpid()}}').write_text(str(os.getpid()))\n"
        "    while os.getppid() == parent:\n"
        "        time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        "    from d2scale.launch.launch import Topology, launch\n"
        "    launch(time.sleep, [1000], Topology(2))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        ranks = wait_for(lambda: pids_in(tmp_path) if len(pids_in(tmp_path)) == 2 else None)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(is_running, ranks)))


def wait_for(condition, seconds=100):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def pids_in(folder):
    return [int(file.read_text()) for file in folder.glob("pid.*") if file.read_text()]


def is_running(pid):
    try:
        # One that has ended and waits for its parent is a zombie.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_port_that_another_program_uses_is_told_in_one_line():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        url = f"tcp://localhost:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"--dist-url .*in use") as caught:
            launch(torch.get_num_threads, topology=Topology(1, 2, 0, url))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid"])
def test_machine_0_at_the_address_of_another_is_told_soon(host, capfd):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"^--dist-url is 'tcp://{host}:29500'; .* \(.*\)$"):
        launch(torch.get_num_threads, topology=Topology(1, 2, 0, f"tcp://{host}:29500"))
    assert time.monotonic() - started < 60
    assert capfd.readouterr().err == ""


def test_another_program_at_the_address_is_no_store(monkeypatch):
    """It answers as a machine of another run would, at an address that is not of this one."""
    monkeypatch.setattr(network, "reason_against", lambda address: None)
    monkeypatch.setattr(network, "_CONNECT_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"another machine answers there"):
        launch(torch.get_num_threads, topology=Topology(1, 2, 0, "tcp://192.0.2.1:29500"))


def test_under_torchrun_the_ranks_are_used(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "from d2scale.launch.launch import Topology, launch\n"
        "from rank_functions import where_am_i\n"
        "found = launch(where_am_i)\n"
        "assert found['world_size'] == Topology(1).world_size == 2\n"
        f"open(r'{tmp_path}/rank%d' % found['rank'], 'w')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, str(script)], check=True, env={**os.environ, "PYTHONPATH": str(SUPPORT)}
    )
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}


A_RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


@pytest.fixture
def a_rank(monkeypatch):
    """What torchrun tells a rank."""
    for name, value in A_RANK.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x") for name in A_RANK if name != "MASTER_ADDR"),
        *((name, "-1") for name in A_RANK if name != "MASTER_ADDR"),
        *((name, None) for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        *(("RANK", "2"), ("LOCAL_RANK", "2"), ("RANK", ""), ("WORLD_SIZE", "0")),
        *(("MASTER_ADDR", ""), ("MASTER_PORT", "0"), ("WORLD_SIZE", "1" + "0" * 5000)),
    ],
)
def test_wrong_variables_of_torchrun_are_told(a_rank, monkeypatch, name, value):
    assert not Topology().faults()
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
        launch(torch.get_num_threads)
    assert caught.value.faults == tuple(Topology().faults())
    # What is asked for before the faults are told.
    assert may_start_anew() in (True, False)
    assert not store_faults()


@pytest.mark.parametrize(("visible", "gpu"), [(1, 0), (4, 3)])
def test_a_process_that_is_shown_one_gpu_uses_that(monkeypatch, visible, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _own_gpu(3) == gpu


def test_world_size_without_torchrun():
    assert Topology(3, 2).world_size == 6


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_machines": 2}, "--dist-url"),
        ({"num_machines": 2, "dist_url": "tcp://h:1", "machine_rank": 2}, "--machine-rank"),
        ({"num_processes": 2, "dist_url": "somewhere"}, "--dist-url"),
        ({"num_processes": 2, "dist_url": "tcp://host:port"}, "--dist-url"),
    ],
)
def test_wrong_addresses_are_told(options, key):
    with pytest.raises(ConfigError, match=key):
        launch(torch.get_num_threads, topology=Topology(**options))
