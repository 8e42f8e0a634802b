"""A training whose disk fills up ends in one line, with its last checkpoint whole."""

import sys

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from small_disks import run_on_small_disk
from training_processes import RECIPE

ONE_CHECKPOINT = 40_000_000  # bytes that hold one checkpoint and no second


@pytest.mark.parametrize(("free", "ranks"), [(8192, 1), (ONE_CHECKPOINT, 2)])
def test_a_full_disk_is_one_line(tmp_path, write_config, monkeypatch, one_thread, free, ranks):
    write_shapes_dataset(tmp_path / "data", 8, 2, image_size=(64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    train = ["train", "--config-file", write_config(RECIPE), "--num-gpus", str(ranks)]
    own = ["OUTPUT_DIR", str(disk / "run"), "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)"]
    command = [sys.executable, "-m", "d2scale.cli", *train, *own]
    done = run_on_small_disk(disk, kept, free, command)
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if "error" in text.lower()]
    assert str(disk / "run") in line
    assert "No space left on device, " in line
    assert "MiB free on its disk" in line
    assert "Traceback" not in done.stdout + done.stderr
    if free == ONE_CHECKPOINT:
        assert (kept / "last_checkpoint").read_text() == "model_0000001.pth"
        assert torch.load(kept / "model_0000001.pth", weights_only=True)["iteration"] == 1
