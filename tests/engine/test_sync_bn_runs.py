"""Whole runs with batch norm that trains: what the plan says of it, and what ranks make of it."""

from __future__ import annotations

import json

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.launch.topology import Topology
from training_processes import RECIPE

SETTINGS = (
    *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "100"),
    *("MODEL.RESNETS.NORM", "BN"),
)


@pytest.fixture
def run(tmp_path, monkeypatch, write_config, one_thread):
    """Train in a folder of this name; return its plan, its log and all weights and statistics."""
    root = write_shapes_dataset(tmp_path / "shapes", 12, 2, image_size=(64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    path = write_config(RECIPE)

    def start(ranks, *opts):
        folder = tmp_path / str(ranks) / "".join(opts)
        train(load_cfg(path, [*SETTINGS, "OUTPUT_DIR", str(folder), *opts]), Topology(ranks))
        model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
        plan = json.loads((folder / "plan.json").read_text())
        values = (value.flatten().double() for value in model.values())
        return plan, (folder / "log.txt").read_text(), torch.cat([*values])

    return start


def test_two_ranks_that_synchronise_train_as_one(run):
    plan, _, expected = run(1)
    assert plan["sync_bn"] is False
    plan, log, found = run(2)
    assert plan["sync_bn"] is True
    assert "2 images in a forward of a GPU are fewer than 8" in log
    assert "take their statistics from 2 ranks" in log
    assert "an out-of-memory error ends this run" in log
    assert "is approximate" not in log
    plan, log, apart = run(2, "D2SCALE.SYNC_BN", "off")
    assert plan["sync_bn"] is False
    assert "an out-of-memory error ends this run" not in log
    assert "is approximate for this model" in log
    assert torch.dist(found, expected) < 0.01 * torch.dist(apart, expected)
