"""d2go's own command trains, evaluates and resumes under the Runner, with 1 and 2 processes."""

import json
import re

import pytest

from d2go_commands import META_FCOS, RETINANET, errors

pytestmark = pytest.mark.timeout(900)

COMMON = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 4, STEPS: [3], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 2}
"""
ALLOWED = ("D2SCALE.ALLOW_CHANGED_RECIPE", "True")


@pytest.fixture
def train(d2go):
    def run(config, processes, *arguments, status=0):
        return d2go(config + COMMON, *arguments, processes=processes, status=status)

    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("config", [META_FCOS, RETINANET], ids=["MetaFCOS", "RetinaNet"])
def test_trains_and_evaluates(train, tmp_path, config, processes):
    train(config, processes)
    out = tmp_path / "out"
    assert (out / "model_final.pth").exists()
    assert list(out.glob("inference/default/final/*/coco_instances_results.json"))
    assert metrics(out)[-1]["iteration"] == 3


def test_resumes_where_it_stopped(train, tmp_path):
    train(META_FCOS, 1)
    output = train(META_FCOS, 1, "--resume", "SOLVER.MAX_ITER", "6", *ALLOWED)
    assert "Starting training from iteration 4" in output
    assert metrics(tmp_path / "out")[-1]["iteration"] == 5


@pytest.mark.parametrize(
    ("processes", "lines"), [(1, 1), (2, 0)], ids=["another world size", "the recipe's own"]
)
def test_the_method_takes_effect_once_on_any_world_size(train, processes, lines):
    output = train(
        META_FCOS, processes, "D2SCALE.IMS_PER_GPU", "1", "SOLVER.AUTO_SCALING_METHODS",
        "('d2scale_max_memory',)", "SOLVER.STEPS", "()", "TEST.FINAL_EVAL", "False",
    )  # fmt: skip
    assert output.count("Applying auto scaling method: d2scale_max_memory") == lines * processes
    assert output.count("Scaled the config:") == processes
    assert re.search(rf"\| SOLVER\.IMS_PER_BATCH +\| 4 +\| {processes} ", output)


def test_the_log_holds_the_plan_and_what_has_no_effect(train, tmp_path):
    settings = ("D2SCALE.EXACT", "True", "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
    settings += ("D2SCALE.TILES.SIZE", "64")
    train(META_FCOS, 1, *settings, "TEST.FINAL_EVAL", "False")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Scaled the config:" in log
    assert log.count("D2SCALE.EXACT has no effect under d2go") == 1
    assert log.count("D2SCALE.TILES.SIZE has no effect under d2go") == 1
    assert "ACTIVATION_CHECKPOINTING has no effect" not in log
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["method"], plan["world_size"], plan["ims_per_batch"]) == ("keep_total", 1, 4)


def test_machines_that_were_given_different_recipes_are_refused(d2go):
    outputs = d2go.on_machines(META_FCOS + COMMON, [(), ("SOLVER.BASE_LR", "0.5")], status=2)
    (line,) = errors(outputs[0])
    assert "SOLVER.BASE_LR on rank 1 is 0.5; allowed: 0.001, as on rank 0" in line
    assert errors(outputs[1]) == []
    assert "Traceback" not in "".join(outputs)


def test_a_mistake_that_the_ranks_find_ends_with_one_line_and_status_2(train):
    output = train(META_FCOS, 3, "SOLVER.IMS_PER_BATCH", "8", status=2)
    (line,) = errors(output)
    assert "SOLVER.IMS_PER_BATCH is 8; allowed: a multiple of 3 processes" in line
    assert "Traceback" not in output


def test_a_mistake_ends_with_one_line_and_status_2(train, tmp_path):
    output = train(META_FCOS, 2, "SOLVER.STEPS", "(2, 1)", status=2)
    assert len(errors(output)) == 1
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_model_that_detectron2_cannot_build_is_one_line_too(train):
    output = train(META_FCOS, 1, "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", status=2)
    assert "RES2_OUT_CHANNELS is 32; allowed: 64 in detectron2" in errors(output)[0]
    assert "Traceback" not in output
