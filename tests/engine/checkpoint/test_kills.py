"""Nothing is left of a run that is killed from outside, and it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from training_processes import RECIPE

MARK = "TEST_OF_KILLS"
RANKS, WORKERS = 2, 1


def processes(mark):
    """Return the processes that have ``mark`` in their environment, and have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            pass  # it has just ended, or is not ours
    return found


def wait_for(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_launcher_that_is_killed_while_loader_workers_start_takes_all_along(
    tmp_path, monkeypatch, one_thread
):
    data = write_shapes_dataset(tmp_path / "shapes", 20, 2, image_size=(64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "d2scale", "train", "--config-file", str(tmp_path / "recipe.yaml")),
        *("--num-gpus", str(RANKS), "OUTPUT_DIR", str(run)),
        *("DATALOADER.NUM_WORKERS", str(WORKERS)),
    ]
    # What it prints goes nowhere: a pipe would stay open with the processes that are looked for.
    launcher = subprocess.Popen(
        command, env={**os.environ, MARK: str(run)}, stdout=subprocess.DEVNULL
    )
    try:
        # Beside launcher, ranks and resource tracker: the first worker, or a tracker of its own.
        wait_for(lambda: len(processes(run)) > RANKS + 2 or launcher.poll() is not None)
        assert launcher.poll() is None
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not processes(run))
    cfg = load_cfg(str(tmp_path / "recipe.yaml"), ["OUTPUT_DIR", str(run)])
    train(cfg, resume=True)
    assert torch.load(run / "model_final.pth", weights_only=True)["images_seen"] == 32
