from __future__ import annotations

import pytest

from d2scale.config import get_cfg
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.planning.virtual_ranks import ModelFacts
from plans import PROFILE, plan_of


def zoo_plan(gpus, *opts, method=None, ims_per_gpu=0, profile=None, budget_gib=None, **asked):
    """The plan of a recipe with 16 images on 8 GPUs, of a model that d2scale does not know."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.merge_from_list(list(opts))
    hardware = Hardware(gpus, budget_gib, profile, ims_per_gpu)
    return make_plan(cfg, hardware, method=method, **asked)


def test_unknown_model_runs_the_recipes_ranks_in_turn():
    plan = zoo_plan(1)
    assert plan.virtual_ranks == 8
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (2, 8, 16)
    assert any("each GPU runs 8 of the recipe's 8 ranks in turn" in note for note in plan.notes)


def test_gpus_need_not_divide_the_recipes():
    plan = zoo_plan(3)
    assert (plan.virtual_ranks, plan.accumulation_steps) == (8, 3)
    assert any("runs 2 or 3 of the recipe's 8" in note for note in plan.notes)


def test_model_that_tells_its_normalizers_needs_none(recipes):
    plan = plan_of(recipes / "experiment-1-baseline.yaml", 1, "keep_total")
    assert (plan.virtual_ranks, plan.ims_per_gpu) == (0, 16)
    asked = plan_of(recipes / "experiment-1-baseline.yaml", 1, opts=("D2SCALE.VIRTUAL_RANKS", "on"))
    assert (asked.virtual_ranks, asked.ims_per_gpu) == (2, 8)


def test_off_takes_one_large_forward():
    plan = zoo_plan(1, "D2SCALE.VIRTUAL_RANKS", "off")
    assert (plan.virtual_ranks, plan.ims_per_gpu) == (0, 16)


def test_plan_says_what_one_large_forward_would_trade():
    plan = zoo_plan(1, profile=PROFILE, budget_gib=12.0)
    assert plan.virtual_ranks == 8
    assert any("off would take up to" in note and "one forward" in note for note in plan.notes)


def test_virtual_rank_that_does_not_fit_is_cut_with_a_note():
    plan = zoo_plan(2, ims_per_gpu=1)
    assert (plan.virtual_ranks, plan.ims_per_gpu, plan.accumulation_steps) == (8, 1, 8)
    assert any("2 images do not fit: in micro-batches of 1" in note for note in plan.notes)


def test_out_of_memory_error_cuts_inside_virtual_ranks():
    plan = zoo_plan(3, "SOLVER.IMS_PER_BATCH", "32").with_micro_batches_of(2)
    assert (plan.ims_per_gpu, plan.accumulation_steps) == (2, 6)


@pytest.mark.parametrize(
    ("gpus", "opts", "method", "reason"),
    [
        (16, (), None, "on 16 GPUs for a recipe of 8"),
        (1, ("SOLVER.REFERENCE_WORLD_SIZE", "3"), None, "16 images on 3 GPUs"),
        (1, ("D2SCALE.ACCUMULATION_STEPS", "4"), None, "with D2SCALE.ACCUMULATION_STEPS"),
        (1, ("D2SCALE.IMS_PER_GPU", "4"), "max_memory", "with the method max_memory"),
    ],
)
def test_where_there_can_be_none_auto_says_so_and_on_is_refused(gpus, opts, method, reason):
    ims_per_gpu = 4 if method else 0
    plan = zoo_plan(gpus, *opts, method=method, ims_per_gpu=ims_per_gpu)
    assert plan.virtual_ranks == 0
    assert method is not None or any(reason in note for note in plan.notes)
    opts += ("D2SCALE.VIRTUAL_RANKS", "on")
    with pytest.raises(ConfigError) as caught:
        zoo_plan(gpus, *opts, method=method, ims_per_gpu=ims_per_gpu)
    (fault,) = caught.value.faults
    assert fault.key == "D2SCALE.VIRTUAL_RANKS"
    assert reason in fault.allowed


def test_obstacle_of_the_model_is_the_reason():
    facts = ModelFacts(obstacle="synchronised batch norm")
    plan = zoo_plan(1, model=facts)
    assert plan.virtual_ranks == 0
    assert any("no virtual ranks with synchronised batch norm" in note for note in plan.notes)


def test_share_that_must_be_one_forward_is_refused_where_it_does_not_fit():
    facts = ModelFacts(obstacle="synchronised batch norm")
    with pytest.raises(ConfigError) as caught:
        zoo_plan(2, ims_per_gpu=4, model=facts)
    assert str(caught.value) == (
        "images per GPU is 4; allowed: 8, the share of a GPU in one forward, with synchronised "
        "batch norm; use more GPUs or smaller images; D2SCALE.VIRTUAL_RANKS off trains it "
        "approximately"
    )
    plan = zoo_plan(2, "D2SCALE.VIRTUAL_RANKS", "off", ims_per_gpu=4, model=facts)
    assert plan.accumulation_steps == 2


def test_recipe_for_one_gpu_needs_none():
    assert zoo_plan(1, "SOLVER.REFERENCE_WORLD_SIZE", "1").virtual_ranks == 0


def test_steps_that_d2scale_does_not_take_have_none():
    assert zoo_plan(1, takes_steps=False).virtual_ranks == 0
    with pytest.raises(ConfigError, match="where d2scale does not take the optimizer steps"):
        zoo_plan(1, "D2SCALE.VIRTUAL_RANKS", "on", takes_steps=False)


def test_recipe_tells_of_synchronised_batch_norm():
    assert zoo_plan(1, "MODEL.FPN.NORM", "SyncBN").virtual_ranks == 0
    facts = ModelFacts.of_recipe(get_cfg(), {"model.backbone.norm": "d2.layers.NaiveSyncBatchNorm"})
    assert facts.obstacle == "synchronised batch norm"
    assert not ModelFacts.of_recipe(get_cfg()).obstacle


def test_per_gpu_has_one_to_a_gpu_if_asked():
    assert zoo_plan(2, method="per_gpu").virtual_ranks == 0
    plan = zoo_plan(2, "D2SCALE.VIRTUAL_RANKS", "on", method="per_gpu")
    assert (plan.virtual_ranks, plan.ims_per_batch, plan.ims_per_gpu) == (2, 4, 2)


def test_wrong_setting_is_refused():
    with pytest.raises(ConfigError, match=r"VIRTUAL_RANKS.*auto, on, off"):
        zoo_plan(1, "D2SCALE.VIRTUAL_RANKS", "yes")
