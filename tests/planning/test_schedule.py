import dataclasses

import pytest

from d2scale.config import get_cfg, load_recipe
from d2scale.config.keys import differences, set_key
from d2scale.errors import ConfigError
from d2scale.planning.schedule import ITERATION_KEYS, Schedule, schedule_faults, schedule_notes


def schedule_of(path, *opts):
    return Schedule.from_cfg(load_recipe(str(path), opts)[0])


def changes(old, new):
    return differences(old.to_config(), new.to_config())


def test_the_64_gpu_recipe_on_one_gpu_is_the_published_table(recipes):
    recipe = schedule_of(recipes / "Meta-FCOS-pretrain.yaml")
    assert changes(recipe, recipe.scaled(2, 1, "linear")) == {
        "QUANTIZATION.QAT.DISABLE_OBSERVER_ITER": (38000, 2432000),
        "QUANTIZATION.QAT.ENABLE_LEARNABLE_OBSERVER_ITER": (36000, 2304000),
        "QUANTIZATION.QAT.ENABLE_OBSERVER_ITER": (35000, 2240000),
        "QUANTIZATION.QAT.FREEZE_BN_ITER": (37000, 2368000),
        "QUANTIZATION.QAT.START_ITER": (35000, 2240000),
        "SOLVER.BASE_LR": (0.01, 0.00015625),
        "SOLVER.CHECKPOINT_PERIOD": (10000, 640000),
        "SOLVER.IMS_PER_BATCH": (128, 2),
        "SOLVER.MAX_ITER": (90000, 5760000),
        "SOLVER.REFERENCE_WORLD_SIZE": (64, 1),
        "SOLVER.STEPS": ((60000, 80000), (3840000, 5120000)),
        "SOLVER.WARMUP_ITERS": (1000, 64000),
    }


def test_a_period_that_d2go_would_round_to_never_stays_a_period(recipes):
    recipe = schedule_of(recipes / "Meta-FCOS-pretrain.yaml", "TEST.EVAL_PERIOD", "3")
    assert recipe.scaled(1024, 512, "linear").iterations["TEST.EVAL_PERIOD"] == 1


def test_ema_decay_is_scaled_only_where_ema_is_enabled(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    off = schedule_of(path)
    assert "MODEL_EMA.DECAY" not in changes(off, off.scaled(32, 2, "linear"))
    on = schedule_of(path, "MODEL_EMA.ENABLED", "True")
    assert changes(on, on.scaled(32, 2, "linear"))["MODEL_EMA.DECAY"] == (0.999, 0.999**2)


def test_the_observers_period_is_scaled_only_where_it_has_an_effect(recipes):
    path, qat = recipes / "experiment-1-baseline.yaml", "QUANTIZATION.QAT.UPDATE_OBSERVER_STATS"
    off = schedule_of(path, f"{qat}_PERIOD", "4")
    assert f"{qat}_PERIOD" not in off.to_config()
    on = schedule_of(path, f"{qat}_PERIOD", "4", f"{qat}_PERIODICALLY", "True")
    assert changes(on, on.scaled(32, 2, "linear"))[f"{qat}_PERIOD"] == (4, 2)
    assert on.scaled(1024, 2, "linear").iterations[f"{qat}_PERIOD"] == 1


def test_precise_batch_norm_is_not_scaled_and_a_note_says_so(recipes):
    opts = ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "50")
    cfg, _ = load_recipe(str(recipes / "experiment-1-baseline.yaml"), opts)
    (note,) = schedule_notes(cfg, Schedule.from_cfg(cfg))
    assert note.startswith("TEST.PRECISE_BN.NUM_ITER stays 50 batches of a GPU")


def test_a_config_without_d2go_keys_has_none_of_them_in_its_schedule():
    cfg = get_cfg()
    del cfg["QUANTIZATION"]
    del cfg["MODEL_EMA"]
    keys = Schedule.from_cfg(cfg).to_config()
    assert not [key for key in keys if key.startswith(("QUANTIZATION", "MODEL_EMA"))]
    assert "TEST.EVAL_PERIOD" in keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.REFERENCE_WORLD_SIZE", -4),
        ("SOLVER.IMS_PER_BATCH", 0),
        ("SOLVER.IMS_PER_BATCH", "16"),
        ("SOLVER.BASE_LR", 0.0),
        ("SOLVER.BASE_LR", -0.1),
        ("SOLVER.BASE_LR", float("nan")),
        ("SOLVER.BASE_LR", float("inf")),
        ("SOLVER.BASE_LR", None),
        ("SOLVER.BASE_LR_END", -0.1),
        ("SOLVER.MAX_ITER", 0),
        ("SOLVER.MAX_ITER", None),
        ("SOLVER.STEPS", (3, 2)),
        ("SOLVER.STEPS", (2, 2)),
        ("SOLVER.STEPS", (0, 2)),
        ("SOLVER.STEPS", (10.5,)),
        ("SOLVER.STEPS", ("a", 5)),
        ("SOLVER.STEPS", 5),
        ("MODEL_EMA.DECAY", 1.5),
        ("TEST.EVAL_PERIOD", -1),
        ("TEST.EVAL_PERIOD", "never"),
    ],
)
def test_every_fault_names_its_key(key, value):
    cfg = get_cfg()
    cfg.MODEL_EMA.ENABLED = True
    assert schedule_faults(cfg) == []
    set_key(cfg, key, value)
    (fault,) = schedule_faults(cfg)
    assert fault.key == key
    assert "\n" not in str(fault)


def test_all_faults_are_found_together():
    cfg = get_cfg()
    for key, value in (
        ("BASE_LR", -1.0),
        ("STEPS", (3, 2)),
        ("MAX_ITER", 0),
        ("REFERENCE_WORLD_SIZE", -1),
    ):
        cfg.SOLVER[key] = value
    keys = {fault.key.removeprefix("SOLVER.") for fault in schedule_faults(cfg)}
    assert keys == {"BASE_LR", "STEPS", "MAX_ITER", "REFERENCE_WORLD_SIZE"}


def test_keys_are_compared_only_where_each_is_right():
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH = None, 1
    assert {fault.key for fault in schedule_faults(cfg)} == {"SOLVER.REFERENCE_WORLD_SIZE"}


def test_a_batch_too_large_for_the_drops_is_an_error():
    schedule = dataclasses.replace(
        Schedule.from_cfg(get_cfg()), max_iter=8, steps=(2, 4, 6), iterations={}
    )
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS is \(2, 4, 6\)"):
        schedule.scaled(16 * 4, 8, "linear")


def test_every_iteration_key_of_the_defaults_is_read():
    assert set(Schedule.from_cfg(get_cfg()).iterations) == set(ITERATION_KEYS)


def test_a_batch_below_its_gpus_says_what_to_set():
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH = 8, 4
    (fault,) = schedule_faults(cfg)
    assert fault.key == "SOLVER.IMS_PER_BATCH"
    assert "set REFERENCE_WORLD_SIZE to the number of GPUs" in str(fault)


@pytest.mark.parametrize(("images", "gpus"), [(16, 8), (4, 4), (12, 6), (7, 7), (11, 1), (1, 1)])
def test_a_recipe_that_leaves_its_gpus_out_is_for_as_many_as_share_its_batch(images, gpus):
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = images
    schedule = Schedule.from_cfg(cfg)
    assert schedule.reference_world_size == gpus
    notes = schedule_notes(cfg, schedule)
    assert [f"taken as {gpus}," in note for note in notes] == [True] * (gpus != 8)


@pytest.mark.parametrize("rule", ["linear", "gain"])
def test_steps_beyond_the_end_are_left_out_and_told(rule):
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 20000, (10000, 30000)
    schedule = Schedule.from_cfg(cfg)
    assert schedule_faults(cfg) == []
    # Kept, 30000 would come before the end of a training that is twice as long.
    planned = schedule.scaled(8, 4, rule)
    assert planned.steps == ((20000,) if rule == "linear" else (10000,))
    assert changes(schedule, planned)["SOLVER.STEPS"][0] == (10000, 30000)
    assert "(10000, 30000) do not all come before" in schedule_notes(cfg, schedule)[0]


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupPolyLR"])
def test_steps_are_not_judged_under_a_schedule_that_does_not_read_them(name):
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS = name, (30000, 20, 90000)
    assert schedule_faults(cfg) == []
    schedule = Schedule.from_cfg(cfg)
    assert "SOLVER.STEPS" not in changes(schedule, schedule.scaled(2, 1, "linear"))
    assert schedule_notes(cfg, schedule) == []
