import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.config import get_cfg, load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase
from d2scale.planning.methods import METHODS, method_of
from d2scale.planning.plan import make_plan

PROFILE = MemoryProfile(
    (Phase("optimizer", 2 * GIB, 0), Phase("backward", GIB, GIB)), source="measured"
)


def plan_of(path, gpus, method=None, opts=(), **hardware):
    cfg, _ = load_recipe(str(path), opts)
    return make_plan(cfg, Hardware.from_cfg(cfg, gpus, **hardware), method=method)


def with_profile(path, gpus, method, budget_gib, opts=()):
    cfg, _ = load_recipe(str(path), opts)
    return make_plan(cfg, Hardware(gpus, budget_gib, PROFILE), method=method)


def test_keep_total_on_one_gpu_changes_only_the_world_size(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 1, "keep_total")
    assert plan.changes == {"SOLVER.REFERENCE_WORLD_SIZE": (2, 1)}
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (16, 1, 16)


def test_keep_total_on_three_gpus_keeps_the_total_and_reports_the_uneven_split(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 3, "keep_total")
    assert plan.ims_per_batch == 16
    assert any("6, 5, 5" in note for note in plan.notes)


def test_max_memory_with_15_images_on_two_gpus_is_the_exact_third_experiment(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 2, "max_memory", ims_per_gpu=15)
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


def test_memory_decides_the_micro_batches_of_a_given_total(recipes):
    plan = with_profile(recipes / "experiment-1-baseline.yaml", 1, "keep_total", 8.0)
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (6, 3, 16)
    assert plan.predicted_peak_gib == 7.0


def test_memory_decides_the_total_of_max_memory(recipes):
    plan = with_profile(recipes / "experiment-1-baseline.yaml", 2, "max_memory", 16.0)
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (15, 1, 30)
    assert plan.predicted_peak_gib == 16.0


def test_max_ims_per_batch_caps_and_says_so(recipes):
    path, cap = recipes / "experiment-1-baseline.yaml", ("D2SCALE.MAX_IMS_PER_BATCH", "24")
    plan = with_profile(path, 2, "max_memory", 16.0, cap)
    assert (plan.ims_per_batch, plan.ims_per_gpu) == (24, 12)
    assert any("MAX_IMS_PER_BATCH" in note for note in plan.notes)


def test_accumulation_steps_are_honoured_or_refused(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    four = plan_of(path, 1, "keep_total", ("D2SCALE.ACCUMULATION_STEPS", "4"))
    assert (four.ims_per_gpu, four.accumulation_steps) == (4, 4)
    with pytest.raises(ConfigError, match="at most 16"):
        plan_of(path, 1, "keep_total", ("D2SCALE.ACCUMULATION_STEPS", "17"))
    with pytest.raises(ConfigError, match="at least 2"):
        with_profile(path, 1, "keep_total", 12.0, ("D2SCALE.ACCUMULATION_STEPS", "1"))


def test_max_memory_says_what_is_missing(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    with pytest.raises(ConfigError, match=r"--gpu-memory-gib.* and .*--profile"):
        plan_of(path, 2, "max_memory")
    with pytest.raises(ConfigError, match=r"or a memory profile \(--profile\)"):
        plan_of(path, 2, "max_memory", budget_gib=16.0)


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
        (("D2SCALE.LR_RULE", "cubic"), 1, "per_gpu", "auto, linear, sqrt, none"),
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


def test_a_cap_below_the_number_of_gpus_is_refused(recipes):
    cap = ("D2SCALE.MAX_IMS_PER_BATCH", "3", "D2SCALE.IMS_PER_GPU", "2")
    with pytest.raises(ConfigError, match=r"MAX_IMS_PER_BATCH is 3"):
        plan_of(recipes / "experiment-1-baseline.yaml", 4, "max_memory", cap)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([], "keep_total"),
        (["d2scale_max_memory"], "max_memory"),
        (["default_scale_d2_configs", "default_scale_quantization_configs"], "per_gpu"),
    ],
)
def test_the_config_names_the_method(methods, expected):
    assert method_of(methods) == expected


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["d2scale_per_gpu", "d2scale_keep_total"], "twice"),
        (["d2scale_per_gpu", "d2scale_per_gpu"], "twice"),
        (["default_scale_d2_configs", "d2scale_per_gpu"], "twice"),
        (["d2scale_fill"], "d2scale_max_memory"),
        (["their_method"], "default_scale_d2_configs"),
    ],
)
def test_methods_that_are_unknown_or_would_scale_twice_are_refused(methods, message):
    with pytest.raises(ConfigError, match=message):
        method_of(methods)


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
    content = plan_of(recipes / "experiment-1-baseline.yaml", 1).to_json()
    assert list(json.loads(json.dumps(content))) == [
        "method",
        "world_size",
        "ims_per_gpu",
        "accumulation_steps",
        "ims_per_batch",
        "batch_ratio",
        "lr_rule",
        "predicted_peak_gib",
        "changes",
        "notes",
    ]
    assert content["changes"] == {"SOLVER.REFERENCE_WORLD_SIZE": [2, 1]}
    assert content["predicted_peak_gib"] is None


def test_as_many_micro_batches_are_taken_as_asked_or_none(recipes):
    path = recipes / "experiment-1-baseline.yaml"

    def micro_batches(steps, *opts, images=5, method="keep_total"):
        batch = ("SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", str(images))
        asked = ("D2SCALE.ACCUMULATION_STEPS", str(steps), *batch, *opts)
        return plan_of(path, 1, method, asked).accumulation_steps

    for steps in (1, 2, 3, 5):
        assert micro_batches(steps) == steps
    with pytest.raises(ConfigError, match=r"ACCUMULATION_STEPS is 4; allowed: 3 or 5 with 5 imag"):
        micro_batches(4)
    # Where a cap leaves fewer images than fit into the memory, too.
    filled = ("D2SCALE.IMS_PER_GPU", "8", "D2SCALE.MAX_IMS_PER_BATCH")
    assert micro_batches(4, *filled, "20", method="max_memory") == 4
    with pytest.raises(ConfigError, match="allowed: 3 or 5 with 5 images"):
        micro_batches(4, *filled, "5", method="max_memory")


def test_a_plan_cut_by_an_out_of_memory_error_is_that_of_the_real_micro_batches(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    plan = plan_of(path, 2, opts=("SOLVER.IMS_PER_BATCH", "10"))
    cut = plan.with_smaller_micro_batches(4)
    assert (plan.ims_per_gpu, cut.ims_per_gpu, cut.accumulation_steps) == (5, 3, 2)
    assert cut.notes[:-1] == plan.notes


def test_an_empty_method_is_no_method(recipes):
    with pytest.raises(ConfigError, match="per_gpu, keep_total, max_memory"):
        plan_of(recipes / "experiment-1-baseline.yaml", 1, "")
