"""Whole runs of virtual ranks: the same weights on any number of ranks, resumed on another."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from d2scale.launch.topology import Topology
from training_processes import RECIPE

# Batch norm that trains.
SETTINGS = (
    *("SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "4"),
    *("SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.RESNETS.NORM", "BN"),
    *("D2SCALE.VIRTUAL_RANKS", "on", "D2SCALE.ORDERED_SUM", "True", "D2SCALE.EXACT", "False"),
)


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch, one_thread):
    folder = tmp_path_factory.mktemp("shapes")
    root = write_shapes_dataset(folder, 20, 2, image_size=(64, 96))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))


@pytest.fixture
def run(tmp_path, write_config):
    """Train in a folder of this name; return what its last checkpoint holds."""
    path = write_config(RECIPE)

    def start(folder, ranks, *opts, **options):
        folder = tmp_path / folder
        cfg = load_cfg(path, [*SETTINGS, "OUTPUT_DIR", str(folder), *opts])
        train(cfg, Topology(ranks), **options)
        return torch.load(folder / "model_final.pth", weights_only=True)

    return start


def test_runs_on_any_number_of_ranks_end_with_the_same_bits(run, tmp_path):
    alone = run("alone", 1)
    plan = json.loads((tmp_path / "alone" / "plan.json").read_text())
    assert (plan["virtual_ranks"], plan["ims_per_gpu"], plan["accumulation_steps"]) == (4, 2, 4)
    states = alone["virtual_ranks"]["states"]
    name = next(name for name in states[0]["buffers"] if name.endswith("running_mean"))
    assert len(states) == 4
    assert not torch.equal(states[0]["buffers"][name], states[1]["buffers"][name])
    assert torch.equal(alone["model"][name], states[0]["buffers"][name])
    three = run("three", 3)
    assert_same(alone, three)


def test_training_goes_on_with_every_state_on_another_number_of_ranks(run):
    whole = run("whole", 1)
    run("parts", 3, "SOLVER.MAX_ITER", "2")
    opts = ("D2SCALE.ALLOW_CHANGED_RECIPE", "True")
    assert_same(whole, run("parts", 1, *opts, resume=True))


def test_evaluation_leaves_every_state_alone(run):
    opts = ("TEST.EVAL_PERIOD", "1", "DATASETS.TEST", "('coco_pretrain_val_base',)")
    assert_same(run("alone", 1), run("evaluated", 3, *opts))


def test_refused_where_there_can_be_none(run, tmp_path):
    with pytest.raises(ConfigError, match=r"on 2 GPUs for a recipe of 1"):
        run("refused", 2, "SOLVER.REFERENCE_WORLD_SIZE", "1")
    assert not (tmp_path / "refused").exists()


def test_model_that_tells_its_normalizers_runs_none_unasked(run, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run("auto", 1, "D2SCALE.VIRTUAL_RANKS", "auto", "SOLVER.MAX_ITER", "1")
    assert json.loads((tmp_path / "auto" / "plan.json").read_text())["virtual_ranks"] == 0


def assert_same(one, other):
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for state, twin in zip(
        one["virtual_ranks"]["states"], other["virtual_ranks"]["states"], strict=True
    ):
        assert state["attributes"] == twin["attributes"]
        for name, value in state["buffers"].items():
            assert torch.equal(value, twin["buffers"][name]), name
