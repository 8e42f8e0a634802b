from __future__ import annotations

from fractions import Fraction

import pytest

from d2scale.config import load_cfg
from d2scale.errors import CheckpointError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.planning.progress import (
    Progress,
    next_iteration,
    plan_changes,
    recipe_changes,
    recipe_of,
    refuse_changes,
)

RECIPE = "d2scale://MetaFCOS/experiment-1-baseline.yaml"


def recipe(*opts):
    return load_cfg(RECIPE, [str(opt) for opt in opts])


def stopped(cfg, plan, images=160):
    return Progress(images // plan.ims_per_batch - 1, images, recipe_of(cfg), plan.to_json())


def plan_of(cfg, gpus=1, method="keep_total", m=2, lr_rule="linear"):
    hardware = Hardware.from_cfg(cfg, gpus, ims_per_gpu=m)
    return make_plan(cfg, hardware, method=method, lr_rule=lr_rule)


@pytest.mark.parametrize("total", [1, 3, 4, 7, 16, 30, 1000])
@pytest.mark.parametrize("recipe_batch", [1, 4, 5])
def test_the_rest_of_the_recipe_is_shown_within_one_step(total, recipe_batch):
    recipe_images = 60 * recipe_batch
    max_iter = -(-recipe_images // total)
    for seen in range(recipe_images + 1):
        first = next_iteration(
            seen, recipe_images=recipe_images, ims_per_batch=total, max_iter=max_iter
        )
        shown = seen + (max_iter - first) * total
        assert recipe_images <= shown < recipe_images + total
        # The learning rate is that of the right image, within one step.
        assert abs(first * total - seen) < total
        if seen % total == 0:
            assert first == seen // total


def test_nothing_is_left_after_the_end():
    assert next_iteration(999, recipe_images=160, ims_per_batch=16, max_iter=10) == 10


def test_there_and_back_again_ends_with_the_recipes_images():
    # 11 steps of 6, then 3 of 10, then of 6 again.
    recipe_images, seen = 6 * 50, 0
    for total, steps in ((6, 11), (10, 3), (6, None)):
        max_iter = -(-recipe_images // total)
        first = next_iteration(
            seen, recipe_images=recipe_images, ims_per_batch=total, max_iter=max_iter
        )
        seen += total * (max_iter - first if steps is None else steps)
    assert recipe_images <= seen < recipe_images + 6


def test_the_recipe_is_what_the_training_computes():
    found = recipe_of(recipe())
    for key in ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "DATASETS.TRAIN", "SEED", "INPUT.FORMAT"):
        assert key in found
    for key in (
        *("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "MODEL.DEVICE", "MODEL.WEIGHTS"),
        *("DATALOADER.NUM_WORKERS", "DATASETS.TEST", "INPUT.MIN_SIZE_TEST", "OUTPUT_DIR"),
        *("SOLVER.REFERENCE_WORLD_SIZE", "MODEL.FCOS.INFERENCE_TH_TEST", "MODEL_EMA.DECAY"),
    ):
        assert key not in found
    assert not any(key.startswith(("D2SCALE.", "QUANTIZATION.")) for key in found)


@pytest.mark.parametrize(
    ("gpus", "method", "m"), [(1, "keep_total", 2), (3, "max_memory", 5), (2, "per_gpu", 1)]
)
def test_a_plan_is_no_change_of_the_recipe(gpus, method, m):
    cfg = recipe()
    plan = plan_of(cfg, gpus, method, m)
    assert recipe_changes(stopped(cfg, plan), recipe_of(cfg)) == {}
    # Nor is the planned config that a run leaves in its folder.
    assert recipe_changes(stopped(cfg, plan), recipe_of(plan.apply(cfg))) == {}
    # And from the planned config the recipe as written can be had back.
    assert recipe_of(plan.apply(cfg), plan.changes) == recipe_of(cfg)


def test_a_changed_recipe_is_told_line_by_line():
    cfg = recipe()
    other = recipe(
        *("SOLVER.BASE_LR", 0.02, "DATASETS.TRAIN", "('coco_2017_val',)"),
        *("SOLVER.STEPS", "(1, 2)", "SOLVER.CHECKPOINT_PERIOD", 7),
    )
    changes = recipe_changes(stopped(cfg, plan_of(cfg)), recipe_of(other))
    assert changes == {
        "SOLVER.BASE_LR": (0.01, 0.02),
        "DATASETS.TRAIN": (list(cfg.DATASETS.TRAIN), ["coco_2017_val"]),
        "SOLVER.STEPS": (list(cfg.SOLVER.STEPS), [1, 2]),
    }
    with pytest.raises(CheckpointError) as caught:
        refuse_changes(changes)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("SOLVER.BASE_LR is 0.02; allowed: 0.01, as in") for line in lines)
    assert all("--allow-changed-recipe" in line for line in lines)
    refuse_changes({})


def test_a_checkpoint_without_a_record_states_its_assumption():
    progress = Progress.without_record(iteration=99, ims_per_batch=16)
    assert progress.images_seen == 1600
    assert "assuming this recipe" in progress.assumption
    assert "100 iterations of 16 images" in progress.assumption
    assert recipe_changes(progress, recipe_of(recipe())) == {}


def test_plans_are_compared_with_the_values_of_the_recipe():
    cfg = recipe()
    old, new = plan_of(cfg, 2), plan_of(cfg, 1, "max_memory", 4)
    changes = plan_changes(old.to_json(), new.to_json())
    assert changes["GPUs"] == (2, 1)
    assert changes["method"] == ("keep_total", "max_memory")
    assert changes["total batch"] == (16, 4)
    assert changes["SOLVER.MAX_ITER"] == (30000, 120000)
    assert changes["SOLVER.STEPS"] == ([20000, 25000], [80000, 100000])
    back = plan_changes(new.to_json(), old.to_json())
    assert back == {key: (after, before) for key, (before, after) in changes.items()}
    assert plan_changes(old.to_json(), old.to_json()) == {}
    synchronised = {**old.to_json(), "sync_bn": True}
    assert plan_changes(old.to_json(), synchronised) == {"synchronised batch norm": (False, True)}
    before_it_was_known = {k: v for k, v in old.to_json().items() if k != "sync_bn"}
    assert plan_changes(before_it_was_known, synchronised) == {}


def test_a_schedule_stands_at_the_same_fraction():
    recipe_images = 90000 * 16
    for total in (2, 6, 30, 128):
        max_iter = -(-recipe_images // total)
        first = next_iteration(
            600000, recipe_images=recipe_images, ims_per_batch=total, max_iter=max_iter
        )
        assert abs(Fraction(first, max_iter) - Fraction(600000, recipe_images)) < Fraction(
            2, max_iter
        )
