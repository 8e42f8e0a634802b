import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.config import get_cfg, load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.methods import METHODS
from d2scale.planning.plan import make_plan
from plans import PROFILE, plan_of, with_profile


def test_keep_total_on_one_gpu_changes_only_the_world_size(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 1, "keep_total")
    assert plan.changes == {"SOLVER.REFERENCE_WORLD_SIZE": (2, 1)}
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (16, 1, 16)


def test_keep_total_on_three_gpus_keeps_the_total_and_reports_the_uneven_split(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 3, "keep_total")
    assert plan.ims_per_batch == 16
    assert any("6, 5, 5" in note for note in plan.notes)


def test_max_memory_with_15_images_on_two_gpus_is_the_exact_third_experiment(recipes):
    opts = ("D2SCALE.LR_RULE", "linear")
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 2, "max_memory", opts, ims_per_gpu=15)
    new = {key: value for key, (_, value) in plan.changes.items()}
    assert new["SOLVER.IMS_PER_BATCH"] == 30
    assert new["SOLVER.BASE_LR"] == 0.01875
    assert new["SOLVER.MAX_ITER"] == 16000
    assert new["SOLVER.STEPS"] == (10667, 13333)


def test_per_gpu_rounds_a_batch_that_does_not_divide_and_says_so(recipes):
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", "3")
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 2, "per_gpu", opts)
    assert plan.ims_per_batch == 11
    assert any("10.67" in note for note in plan.notes)


@given(st.integers(1, 64), st.integers(1, 8), st.sampled_from(METHODS))
def test_any_recipe_on_its_own_gpus_gives_back_itself(world_size, per_gpu, method):
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = world_size
    cfg.SOLVER.IMS_PER_BATCH = world_size * per_gpu
    plan = make_plan(cfg, Hardware(world_size, ims_per_gpu=per_gpu), method=method)
    assert plan.changes == {}
    assert plan.apply(cfg) == cfg


def test_a_gpu_too_small_for_one_image_is_told_by_how_much(recipes):
    with pytest.raises(ConfigError, match=r"0\.50 GiB are missing"):
        with_profile(recipes / "experiment-1-baseline.yaml", 1, "max_memory", 1.5)


def test_the_budget_keeps_back_what_fraction_says(recipes):
    cfg, _ = load_recipe(str(recipes / "experiment-1-baseline.yaml"))
    cfg.D2SCALE.MEMORY.FRACTION = 0.5
    predicted = replace(PROFILE, source="predicted")
    assert replace(Hardware.from_cfg(cfg, 1, budget_gib=16.0), profile=predicted).room_gib == 8.0


@pytest.mark.parametrize(
    ("opts", "gpus", "method", "message"),
    [
        ((), 0, "keep_total", "number of GPUs is 0"),
        ((), 17, "keep_total", r"SOLVER\.IMS_PER_BATCH is 16"),
        ((), 1, "fill", "per_gpu, keep_total, max_memory"),
        (("D2SCALE.LR_RULE", "cubic"), 1, "per_gpu", "auto, linear, sqrt, none, gain"),
        (("D2SCALE.MEMORY.FRACTION", "1.5"), 1, "per_gpu", "at most 1"),
        (("D2SCALE.IMS_PER_GPU", "-1"), 1, "per_gpu", r"D2SCALE\.IMS_PER_GPU is -1"),
        (("D2SCALE.MAX_IMS_PER_BATCH", "-1"), 1, "per_gpu", r"MAX_IMS_PER_BATCH is -1"),
    ],
)
def test_requests_that_cannot_be(recipes, opts, gpus, method, message):
    with pytest.raises(ConfigError, match=message) as raised:
        plan_of(recipes / "experiment-1-baseline.yaml", gpus, method, opts)
    assert "\n" not in str(raised.value)


def test_an_unknown_method_is_told_with_the_other_faults(recipes):
    opts = ("SOLVER.AUTO_SCALING_METHODS", "('d2scale_fill',)", "SOLVER.BASE_LR", "-1")
    with pytest.raises(ConfigError) as raised:
        plan_of(recipes / "experiment-1-baseline.yaml", 1, opts=opts)
    assert [fault.key for fault in raised.value.faults] == [
        "SOLVER.BASE_LR",
        "SOLVER.AUTO_SCALING_METHODS",
    ]


def test_adam_like_optimizers_follow_the_square_root(recipes):
    opts = ("SOLVER.OPTIMIZER", "adamw")
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 8, "per_gpu", opts)
    assert plan.lr_rule == "sqrt"
    assert plan.changes["SOLVER.BASE_LR"] == (0.01, 0.02)


def test_applying_a_plan_leaves_the_recipe_and_keeps_it_frozen(recipes):
    cfg, _ = load_recipe(str(recipes / "experiment-1-baseline.yaml"))
    cfg.freeze()
    plan = make_plan(cfg, Hardware(1), method="per_gpu")
    planned = plan.apply(cfg)
    assert (cfg.SOLVER.IMS_PER_BATCH, planned.SOLVER.IMS_PER_BATCH) == (16, 8)
    assert planned.is_frozen()


def test_json_has_the_documented_keys(recipes):
    # No memory profile is of such images.
    opts = ("INPUT.MAX_SIZE_TRAIN", "1000")
    content = plan_of(recipes / "experiment-1-baseline.yaml", 1, opts=opts).to_json()
    assert list(json.loads(json.dumps(content))) == [
        "method",
        "world_size",
        "ims_per_gpu",
        "accumulation_steps",
        "ims_per_batch",
        "batch_ratio",
        "lr_rule",
        "steps",
        "predicted_peak_gib",
        "changes",
        "notes",
        "expected_steps",
        "virtual_ranks",
        "sync_bn",
    ]
    assert content["changes"] == {"SOLVER.REFERENCE_WORLD_SIZE": [2, 1]}
    assert content["predicted_peak_gib"] is None


def test_a_plan_cut_by_an_out_of_memory_error_is_that_of_the_real_micro_batches(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    plan = plan_of(path, 2, opts=("SOLVER.IMS_PER_BATCH", "10"))
    cut = plan.with_micro_batches_of(4)
    assert (plan.ims_per_gpu, cut.ims_per_gpu, cut.accumulation_steps) == (5, 3, 2)
    assert cut.notes[:-1] == plan.notes


def test_an_empty_method_is_no_method(recipes):
    with pytest.raises(ConfigError, match="per_gpu, keep_total, max_memory"):
        plan_of(recipes / "experiment-1-baseline.yaml", 1, "")
