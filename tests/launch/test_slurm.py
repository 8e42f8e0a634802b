"""The batch script of docs/clusters.md on a real SLURM."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from slurm import slurm_cluster
from training_processes import RECIPE, SAME_BITS

SCRIPT = Path(__file__).parents[2] / "docs/slurm/train.sbatch"
# Long enough to be killed in the middle.
LENGTH = ("SOLVER.MAX_ITER", "24", "SOLVER.STEPS", "(16,)")


def wait_for(condition, log):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, log()
        time.sleep(0.1)


def test_a_job_that_is_killed_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path, one_thread, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_shapes_dataset(tmp_path, 20, 2)))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    recipe, run, log = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "log"
    recipe.write_text(RECIPE)
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    options = ("--config-file", str(recipe), *LENGTH, *SAME_BITS, "OUTPUT_DIR", str(run))
    with slurm_cluster(slurm) as cluster:
        job = cluster.run(
            *("sbatch", "--parsable", "--nodes=2", f"--output={log}", f"--chdir={tmp_path}"),
            *(str(SCRIPT), *options),
        )

        def state():
            return cluster.run("squeue", "--noheader", "--format=%T", f"--jobs={job}")

        wait_for(lambda: list(run.glob("model_*.pth")), lambda: log.read_text()[-5000:])
        cluster.run("scancel", "--signal=KILL", f"{job}.0")
        wait_for(lambda: state() == "PENDING", lambda: log.read_text()[-5000:])
        assert not (run / "model_final.pth").exists()
        train(load_cfg(str(recipe), [*LENGTH, *SAME_BITS, "OUTPUT_DIR", str(tmp_path / "whole")]))
        wait_for(lambda: state() in ("", "COMPLETED"), lambda: log.read_text()[-5000:])
        assert "JobState=COMPLETED Reason=None" in cluster.run("scontrol", "show", "job", job)
    assert "going on with iteration" in (run / "log.txt").read_text()
    final, expected = (
        torch.load(tmp_path / n / "model_final.pth")["model"] for n in ("run", "whole")
    )
    assert all(torch.equal(final[name], weight) for name, weight in expected.items())
