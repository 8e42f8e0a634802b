import json
from pathlib import Path

import pytest

from d2scale.cli import main
from d2scale.config import load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.explore import explore
from d2scale.planning.hardware import Hardware


def choices_of(recipes, budget_gib, method="max_memory", gpus=2):
    cfg, settings = load_recipe(str(recipes / "experiment-1-baseline.yaml"))
    hardware = Hardware.from_cfg(cfg, gpus, budget_gib=budget_gib, settings=settings)
    return explore(cfg, hardware, method=method)


def test_every_choice_is_planned(recipes):
    choices = choices_of(recipes, 16.0)
    assert [choice.name for choice in choices] == [
        "float32",
        "float32, activation checkpointing",
        "AMP",
        "AMP, activation checkpointing",
    ]
    images = [choice.plan.ims_per_gpu for choice in choices]
    assert images == sorted(images)
    assert len(set(images)) == 4
    for choice in choices:
        assert choice.plan.ims_per_batch == 2 * choice.plan.ims_per_gpu
        assert choice.plan.predicted_peak_gib <= 0.95 * 16


def test_a_given_total_differs_in_its_micro_batches(recipes):
    choices = choices_of(recipes, 8.0, "keep_total", gpus=1)
    assert {choice.plan.ims_per_batch for choice in choices} == {16}
    assert choices[0].plan.accumulation_steps > choices[-1].plan.accumulation_steps == 1


def test_a_choice_that_does_not_fit_says_what_it_needs(recipes):
    choices = choices_of(recipes, 1.6)
    assert choices[0].plan is None
    assert "of one image" in choices[0].note
    assert choices[-1].plan.ims_per_gpu >= 1


def test_other_faults_are_the_users(recipes):
    with pytest.raises(ConfigError, match="per_gpu, keep_total, max_memory"):
        choices_of(recipes, 16.0, "fill")


def test_it_needs_a_budget_and_a_profile(recipes, capsys):
    path = str(recipes / "experiment-1-baseline.yaml")
    assert main(["plan", path, "--explore"]) == 2
    assert "--gpu-memory-gib" in capsys.readouterr().err
    assert main(["plan", path, "--explore", "MODEL.RESNETS.DEPTH", "101"]) == 2
    assert "--profile" in capsys.readouterr().err


def test_the_command_prints_a_table_or_json(recipes, capsys):
    path = str(recipes / "Meta-FCOS-pretrain.yaml")
    arguments = ["plan", path, "--explore", "--gpu-memory-gib", "16", "--method", "max_memory"]
    assert main(arguments) == 0
    assert "| AMP, activation checkpointing     |" in capsys.readouterr().out
    assert main([*arguments, "--gpus", "2"]) == 0
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert capsys.readouterr().out in readme.read_text(encoding="utf-8")
    assert main([*arguments, "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
