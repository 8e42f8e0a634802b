"""Machines that come and go while a run goes on; namespaces of this machine stand for them."""

from __future__ import annotations

import re
import time

import pytest
import torch

import training_processes
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from d2scale.launch import elastic
from machines import cluster
from training_processes import RECIPE, SAME_BITS

# The place where torchrun's agents meet; on a machine of its own, so that any other may go.
MEETING_PLACE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], 29400, is_master=True, wait_for_workers=False)
time.sleep(1000)
"""


RUNS = ("run", "undisturbed")


def agent(address, meeting_place):
    return (
        *("-m", "torch.distributed.run", "--nnodes", "1:2", "--max-restarts", "10"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting_place}:29400"),
        *("--rdzv-conf", "is_host=0,last_call_timeout=2", "--local-addr", address),
        *("--monitor-interval", "0.1", training_processes.__file__, "train"),
    )


def wait_for(condition, log):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, log.read_text()[-5000:]
        time.sleep(0.1)


def test_machines_leave_and_come(tmp_path, one_thread, monkeypatch):
    """The first machine, which holds the ranks' store, is killed; later another one comes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_shapes_dataset(tmp_path, 20, 2)))
    recipe, run, log = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "log"
    recipe.write_text(RECIPE)
    train(load_cfg(str(recipe), [*SAME_BITS, "OUTPUT_DIR", str(tmp_path / "undisturbed")]))
    log.touch()

    def said(text):
        return lambda: (run / "log.txt").exists() and text in (run / "log.txt").read_text()

    with cluster(4) as (*machines, place):
        place.start("-c", MEETING_PLACE, place.address, log=log)
        words = ("--config-file", str(recipe), *SAME_BITS, "OUTPUT_DIR", str(run))

        def start(machine):
            command = (*agent(machine.address, place.address), *words)
            variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "STAY_BEFORE": "3:2 6:1"}
            return machine.start(*command, log=log, **variables)

        start(machines[0])
        survivor = start(machines[1])
        wait_for((run / "model_0000001.pth").exists, log)
        machines[0].kill()
        wait_for((run / "model_0000005.pth").exists, log)
        assert said("going on with iteration 2 of 8")()
        start(machines[2])
        assert survivor.wait(timeout=120) == 0, log.read_text()[-5000:]
        assert said("going on with iteration 6 of 8")()
    assert re.findall(r"\| GPUs +\| (\d) +\| (\d) +\|", (run / "log.txt").read_text())
    assert_same_weights(run, tmp_path / "undisturbed")


def assert_same_weights(run, other):
    """To the float32 tolerance of another number of ranks."""
    first, second = (torch.load(folder / "model_final.pth") for folder in (run, other))
    for name, weight in first["model"].items():
        torch.testing.assert_close(weight, second["model"][name], rtol=1e-4, atol=1e-4)


@pytest.fixture
def elastic_environment(monkeypatch):
    """What torchrun tells a rank of the first of two machines."""
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "10",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


def test_a_store_for_all_starts_is_refused(elastic_environment, monkeypatch):
    (fault,) = elastic.store_faults()
    assert str(fault).startswith("TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 'not set'; allowed: 1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not elastic.store_faults()


def test_folders_of_their_own_are_refused_where_any_machine_may_go(
    elastic_environment, tmp_path, monkeypatch
):
    monkeypatch.setattr(elastic, "_STALE_SECONDS", 0.0)
    (tmp_path / ".lock").write_text("process 1 on here\n")
    elastic.refuse_separate_folders(tmp_path)
    monkeypatch.setattr(elastic.ranks, "broadcast_object", lambda holder: "process 2 on there")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*one folder for all machines"):
        elastic.refuse_separate_folders(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    elastic.refuse_separate_folders(tmp_path)
