import json

import pytest

from d2scale.engine.config import load_cfg
from d2scale.errors import ConfigError
from meta_fcos.reproduction.experiments import EXPERIMENTS, GAIN, LARGE_BATCH
from meta_fcos.reproduction.planned_experiment import (
    Machine,
    is_finished,
    plan_experiment,
    recipe_faults,
    standing,
)


def on(gpus, gib, tmp_path):
    machine = Machine("cuda", gpus, "a GPU", gib)
    return [
        plan_experiment(each, each.recipe("full", "published"), tmp_path, machine, None)
        for each in EXPERIMENTS
    ]


def steps(runs):
    return [(r.plan.world_size, r.plan.accumulation_steps, r.plan.ims_per_gpu) for r in runs]


def test_two_gpus_run_what_was_published(tmp_path):
    runs = on(2, 16.0, tmp_path)
    assert steps(runs) == [(2, 1, 8), (1, 1, 16), (2, 1, 15), (2, 1, 15)]
    assert [run.plan.ims_per_batch for run in runs] == [16, 16, 30, 30]
    assert [run.plan.method for run in runs] == [*["keep_total"] * 2, "max_memory", "keep_total"]
    assert not any(run.on_fewer_gpus for run in runs)


def test_one_gpu_takes_the_steps_of_two_in_micro_batches_of_their_size(tmp_path):
    runs = on(1, 80.0, tmp_path)
    assert steps(runs) == [(1, 2, 8), (1, 1, 16), (1, 2, 15), (1, 2, 15)]
    assert [run.plan.ims_per_batch for run in runs] == [16, 16, 30, 30]
    assert [run.on_fewer_gpus for run in runs] == [True, False, True, True]
    assert all(run.cfg.D2SCALE.EXACT for run in runs)


def test_a_smaller_gpu_takes_smaller_micro_batches(tmp_path):
    runs = on(1, 6.0, tmp_path)
    published = [run for run in runs if run.experiment != GAIN]
    assert all(run.plan.ims_per_gpu < 8 for run in published)
    assert all(run.plan.predicted_peak_gib <= 6 for run in published)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_gain_rule_runs_the_recipe_with_the_large_batch_on_any_number_of_gpus(ranks, tmp_path):
    machine = Machine("cuda", ranks, "a GPU", 16.0)
    run = plan_experiment(GAIN, GAIN.recipe("full", ""), tmp_path, machine, 48000)
    assert (run.plan.ims_per_batch, run.plan.lr_rule) == (30, "gain")
    assert run.plan.steps == (1600, 3000)
    # Rate and schedule stay the recipe's.
    planned = run.plan.apply(run.cfg).SOLVER
    assert (planned.BASE_LR, planned.MAX_ITER, planned.STEPS) == (0.01, 3000, (2000, 2500))


def test_the_command_line_is_the_run(tmp_path):
    for run in on(1, 80.0, tmp_path)[2:]:
        words = run.arguments
        assert words[0] == "train"
        assert words[words.index("--method") + 1] == run.plan.method
        pairs = words[words.index("--resume") + 1 :]
        again = load_cfg(words[words.index("--config-file") + 1], pairs)
        assert again == run.cfg


def test_more_ranks_than_there_are_are_refused():
    with pytest.raises(ConfigError, match="--num-gpus"):
        Machine.at_hand("small", 10_000)
    with pytest.raises(ConfigError, match="--num-gpus"):
        Machine.at_hand("small", 0)
    assert Machine.at_hand("small", None).ranks == 2
    assert Machine.at_hand("small", 1).ranks == 1


def test_a_run_is_finished_when_it_has_been_evaluated(tmp_path):
    assert standing(tmp_path) == "from the start"
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert standing(tmp_path) == "goes on from model_0000003.pth"
    (tmp_path / "model_final.pth").write_text("")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    rows = json.dumps({"iteration": 9, "total_loss": 2.0}) + "\n"
    (tmp_path / "metrics.json").write_text(rows)
    assert not is_finished(tmp_path)
    (tmp_path / "metrics.json").write_text(rows + '{"bbox/AP": 1.0, "iterat')
    assert not is_finished(tmp_path)
    (tmp_path / "metrics.json").write_text(rows + '{"bbox/AP": 1.0, "iteration": 9}\n')
    assert is_finished(tmp_path)


@pytest.mark.parametrize("experiment", [LARGE_BATCH, GAIN])
def test_a_run_of_another_recipe_is_refused_by_its_keys(experiment, tmp_path):
    recipe = experiment.recipe("small", "")
    run = plan_experiment(experiment, recipe, tmp_path, Machine("cpu", 2, "CPU"), 160)
    assert recipe_faults(run) == []
    run.folder.mkdir()
    planned = run.plan.apply(run.cfg)
    (run.folder / "config.yaml").write_text(planned.dump())
    (run.folder / "plan.json").write_text(json.dumps(run.plan.to_json()))
    assert recipe_faults(run) == []
    planned.SOLVER.MOMENTUM = 0.5
    (run.folder / "config.yaml").write_text(planned.dump())
    (fault,) = recipe_faults(run)
    assert "SOLVER.MOMENTUM" in fault.key
    assert "0.5" in fault.allowed
