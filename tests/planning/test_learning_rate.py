from __future__ import annotations

import pytest

from d2scale.config import load_cfg
from d2scale.engine.planning import check_plan
from d2scale.errors import ConfigError
from d2scale.planning.gain import NoisePoint
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan

RECIPE = "d2scale://MetaFCOS/experiment-1-baseline.yaml"  # 16 images on two GPUs, 30000 steps


def plan_of(*opts, m=16, gpus=2, method="max_memory", **options):
    cfg = load_cfg(RECIPE, [str(opt) for opt in opts])
    return make_plan(cfg, Hardware.from_cfg(cfg, gpus, ims_per_gpu=m), method=method, **options)


@pytest.mark.parametrize(
    ("opts", "options", "rule"),
    [
        ((), {"m": 16}, "gain"),
        ((), {"m": 8}, "linear"),  # the recipe's own batch
        ((), {"m": 4}, "linear"),  # a smaller one
        ((), {"m": 16, "method": "keep_total"}, "linear"),
        ((), {"gpus": 4, "method": "per_gpu"}, "linear"),
        ((), {"m": 16, "takes_steps": False}, "linear"),
        (("SOLVER.OPTIMIZER", "adamw"), {"m": 16}, "sqrt"),
        (("SOLVER.OPTIMIZER", "sgd_mt"), {"m": 16}, "gain"),
        (("SOLVER.OPTIMIZER", "rmsprop"), {"m": 16}, "linear"),
        (("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "()"), {"m": 100}, "linear"),  # not one step
        (("D2SCALE.LR_RULE", "gain"), {"m": 4}, "gain"),
        (("D2SCALE.LR_RULE", "linear"), {"m": 16}, "linear"),
    ],
)
def test_auto_is_the_gain_rule_for_a_larger_batch_of_its_own_sake(opts, options, rule):
    assert plan_of(*opts, **options).lr_rule == rule


def test_the_gain_rule_leaves_the_schedule_to_the_recipe():
    plan = plan_of(m=16)
    assert plan.changes == {
        "D2SCALE.RECIPE_IMS_PER_BATCH": (0, 16),
        "SOLVER.IMS_PER_BATCH": (16, 32),
        "D2SCALE.LR_RULE": ("auto", "gain"),
    }
    assert (plan.batch_ratio, plan.steps, plan.expected_steps) == (2.0, (15000, 30000), None)
    assert "1 to 2 of the recipe's 30000" in plan.notes[-1]


def test_the_planned_config_plans_the_same_again():
    cfg = load_cfg(RECIPE)
    plan = make_plan(cfg, Hardware.from_cfg(cfg, 2, ims_per_gpu=16), method="max_memory")
    planned = plan.apply(cfg)
    again = make_plan(planned, Hardware.from_cfg(planned, 2, ims_per_gpu=16), method="keep_total")
    assert again.changes == {}
    assert (again.lr_rule, again.batch_ratio, again.steps) == ("gain", 2.0, (15000, 30000))
    # By another rule it is the recipe, scaled.
    linear = make_plan(planned, Hardware(2), method="keep_total", lr_rule="linear")
    assert linear.changes["SOLVER.MAX_ITER"] == (30000, 15000)
    assert linear.changes["D2SCALE.RECIPE_IMS_PER_BATCH"] == (16, 0)


def test_steps_to_expect_from_a_known_noise_scale():
    plan = plan_of(m=32).with_noise([NoisePoint(15000, 0.0), NoisePoint(30000, float("inf"))])
    assert plan.expected_steps == 15000 + 15000 // 4
    assert plan_of(m=8).with_noise([NoisePoint(1, 5.0)]).expected_steps is None


@pytest.mark.parametrize(
    ("opts", "options", "message"),
    [
        (("SOLVER.OPTIMIZER", "adamw"), {}, "with SOLVER.OPTIMIZER adamw; take sqrt"),
        ((), {"takes_steps": False}, "take linear, or train with d2scale train"),
        ((), {"m": 1, "gpus": 1}, "a total batch of one image; take a larger batch"),
        (("SOLVER.MAX_ITER", 90, "SOLVER.STEPS", "(60, 80)"), {"m": 400}, "could become 2"),
        (("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "()"), {"m": 100}, "could become 1"),
    ],
)
def test_a_gain_rule_that_cannot_be_followed_is_refused(opts, options, message):
    with pytest.raises(ConfigError) as raised:
        plan_of(*opts, lr_rule="gain", **options)
    assert str(raised.value).startswith("D2SCALE.LR_RULE is 'gain'; allowed: auto, linear, sqrt")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_gain_rule_warns_of_a_smaller_batch():
    assert "linear keeps it" in plan_of("D2SCALE.LR_RULE", "gain", m=4).notes[-1]
    assert "always 1" in plan_of("D2SCALE.LR_RULE", "gain", m=8).notes[-1]


def test_auto_without_the_means_says_what_it_would_be():
    assert any("the gain rule" in note for note in plan_of(takes_steps=False).notes)


def test_too_few_steps_are_told_of_the_schedule_unless_the_rule_was_asked_for():
    opts = ("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", "(50, 80)")
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS"):
        plan_of(*opts, m=400)


def test_the_check_before_the_ranks_accepts_what_they_may_plan():
    """On one GPU the size of a batch that fills the memory is known in the ranks only."""
    opts = [
        "MODEL.DEVICE",
        "cpu",
        "D2SCALE.MEMORY.BUDGET_GIB",
        "8.0",
        "INPUT.MIN_SIZE_TRAIN",
        "(99,)",
    ]
    for rule in ("auto", "gain"):
        check_plan(load_cfg(RECIPE, [*opts, "D2SCALE.LR_RULE", rule]), 1, "max_memory")
