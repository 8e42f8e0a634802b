"""Several processes on one device by gloo, and one by NCCL under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.launch.launch import Topology, launch
from device_ranks import step_on_shared_device
from devices import GPU, on_both_devices
from small_detector import distance
from training_processes import RECIPE


@on_both_devices
def test_two_processes_on_one_device_train_as_one(device, one_thread, record_property):
    whole = step_on_shared_device(device)
    found = launch(step_on_shared_device, [device], Topology(2))
    errors = [distance(mine, theirs) for mine, theirs in zip(found, whole, strict=True)]
    record_property("relative errors", ", ".join(f"{error:.2g}" for error in errors))
    assert max(errors) < 1e-10


# On a CPU other tests run under torchrun, on several ranks.
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_nccl_on_one_rank_twice_under_torchrun(device, tmp_path):
    write_shapes_dataset(tmp_path, 20, 2, image_size=(64, 96))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["-m", "d2scale", "train", "--config-file", str(tmp_path / "recipe.yaml")]
    command += ["--method", "max_memory", "--resume", "MODEL.DEVICE", device]
    command += ["D2SCALE.LR_RULE", "linear", "D2SCALE.MEMORY.BUDGET_GIB", "4"]
    command += ["D2SCALE.MAX_IMS_PER_BATCH", "4"]
    command += ["OUTPUT_DIR", str(tmp_path / "run")]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, timeout=200)
        final = tmp_path / "run" / "model_final.pth"
        content = torch.load(final, weights_only=True)
        assert all(torch.isfinite(value).all() for value in content["model"].values())
        # The second goes on where a stop after the first checkpoint would have left the run.
        final.unlink()
        checkpoints = sorted((tmp_path / "run").glob("model_0*"))
        (tmp_path / "run" / "last_checkpoint").write_text(checkpoints[0].name)
