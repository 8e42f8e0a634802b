from __future__ import annotations

from dataclasses import replace

import pytest

from d2scale.config import load_cfg
from d2scale.errors import CheckpointError
from d2scale.planning.continuation import continue_training
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.planning.progress import Progress, recipe_of

RECIPE = "d2scale://MetaFCOS/experiment-1-baseline.yaml"


def recipe(*opts):
    return load_cfg(RECIPE, [str(opt) for opt in opts])


def stopped(cfg, plan, images=160):
    return Progress(images // plan.ims_per_batch - 1, images, recipe_of(cfg), plan.to_json())


def plan_of(cfg, gpus=1, method="keep_total", m=2, lr_rule="linear"):
    hardware = Hardware.from_cfg(cfg, gpus, ims_per_gpu=m)
    return make_plan(cfg, hardware, method=method, lr_rule=lr_rule)


def continued(cfg, other, **options):
    old, new = plan_of(cfg, 2), plan_of(other, 1, "max_memory", 4)
    return continue_training(
        stopped(cfg, old), recipe_of(other), new.to_json(), max_iter=120000, **options
    )


def test_a_training_goes_on_where_its_images_end_and_says_what_has_changed():
    went_on = continued(recipe(), recipe(), allow_changes=False)
    assert went_on.first_iteration == 160 // 4
    assert (went_on.changes, went_on.warnings) == ({}, ())
    plan, batch, place = went_on.notes
    assert "| SOLVER.STEPS " in plan
    assert "80000, 100000" in plan
    assert "from 16 to 4" in batch
    assert "momentum" in batch
    assert place == "160 images seen in 10 iterations: going on with iteration 40 of 120000"


def test_a_changed_recipe_is_allowed_only_if_the_user_says_so():
    other = recipe("SOLVER.BASE_LR", 0.02)
    with pytest.raises(CheckpointError, match=r"SOLVER\.BASE_LR is 0\.02"):
        continued(recipe(), other, allow_changes=False)
    went_on = continued(recipe(), other, allow_changes=True)
    assert went_on.changes == {"SOLVER.BASE_LR": (0.01, 0.02)}
    (warning,) = went_on.warnings
    assert warning.startswith("the recipe has changed, as allowed:\n")
    assert went_on.keeps_order


def test_another_dataset_has_another_order():
    other = recipe("DATASETS.TRAIN", "('coco_2017_val',)")
    assert not continued(recipe(), other, allow_changes=True).keeps_order


def test_what_a_batch_change_means_depends_on_the_optimizer():
    adamw = recipe("SOLVER.OPTIMIZER", "AdamW")
    assert "second moments" in continued(adamw, adamw, allow_changes=False).notes[1]


def test_a_checkpoint_without_a_record_is_taken_with_a_warning():
    cfg = recipe()
    progress = Progress.without_record(iteration=9, ims_per_batch=16)
    went_on = continue_training(
        progress, recipe_of(cfg), plan_of(cfg).to_json(), max_iter=30000, allow_changes=False
    )
    assert went_on.first_iteration == 10
    assert went_on.warnings == (progress.assumption,)
    assert len(went_on.notes) == 1


def test_auto_may_be_another_rule_on_the_other_side_of_the_recipes_batch():
    cfg = recipe()
    larger, smaller = (plan_of(cfg, 2, "max_memory", m, lr_rule="auto") for m in (16, 4))
    assert (larger.lr_rule, smaller.lr_rule) == ("gain", "linear")
    went_on = continue_training(
        stopped(cfg, larger), recipe_of(cfg), smaller.to_json(), max_iter=60000, allow_changes=False
    )
    assert went_on.changes == {}


def test_another_rule_is_refused_with_the_one_to_add():
    cfg = recipe()
    linear, gain = (plan_of(cfg, 2, "max_memory", 16, lr_rule=rule) for rule in ("linear", "auto"))
    with pytest.raises(CheckpointError, match=r"add D2SCALE\.LR_RULE linear, or accept"):
        continue_training(
            stopped(cfg, linear), recipe_of(cfg), gain.to_json(), max_iter=9, allow_changes=False
        )


def test_a_gain_run_goes_on_from_what_its_steps_were_worth():
    cfg = recipe()
    plan = plan_of(cfg, 2, "max_memory", 16, lr_rule="gain")
    before = replace(stopped(cfg, plan), recipe_images=120.0)
    went_on = continue_training(
        before, recipe_of(cfg), plan.to_json(), max_iter=30000, allow_changes=False
    )
    assert (went_on.iterations, went_on.first_iteration) == (7.5, 8)
    assert went_on.recipe_images == 120.0
