from __future__ import annotations

import json

import pytest

from d2scale.config import get_cfg
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.planning.sync_bn import choose_sync_bn
from d2scale.planning.virtual_ranks import SYNCHRONISED, ModelFacts

TWO, EIGHT = [[2], [2]], [[8], [8]]


def choose(asked, sizes, recipe=False, trains=True, virtual=0):
    return choose_sync_bn(
        asked, sizes, recipe_has_it=recipe, trains_batch_norm=trains, virtual_ranks=virtual
    )


@pytest.mark.parametrize(
    ("asked", "sizes", "facts", "synchronised", "reason"),
    [
        ("auto", TWO, {}, True, "2 images in a forward of a GPU are fewer than 8"),
        ("auto", [[8, 8], [8, 7]], {}, False, "8 images in a forward of a GPU are enough"),
        ("auto", [[2, 2], [2, 1]], {}, True, "those of one micro-batch of each GPU"),
        ("auto", [[2, 2], [3]], {}, False, "GPUs take 1 or 2 forwards in a step"),
        ("auto", TWO, {"virtual": 8}, False, "each virtual rank has the statistics of its own"),
        ("auto", EIGHT, {"recipe": True}, True, "so is the recipe's"),
        ("auto", TWO, {"trains": False}, False, ""),
        ("auto", [[2]], {}, False, ""),
        ("auto", [[2]], {"recipe": True}, False, ""),
        ("on", EIGHT, {}, True, "as asked"),
        ("on", [[2]], {}, False, "has no effect: there is one GPU"),
        ("on", TWO, {"trains": False}, False, "has no effect: the model trains no batch norm"),
        ("off", TWO, {}, False, ""),
        ("off", TWO, {"recipe": True}, False, "as asked, though the recipe's is"),
    ],
)
def test_each_choice_has_its_reason(asked, sizes, facts, synchronised, reason):
    found, notes = choose(asked, sizes, **facts)
    assert found == synchronised
    assert reason in "; ".join(notes)
    assert bool(notes) == bool(reason)
    assert any("an out-of-memory error ends the run" in note for note in notes) == synchronised


@pytest.mark.parametrize(("asked", "recipe"), [("on", False), ("auto", True)])
def test_ranks_that_would_wait_for_ever_are_refused(asked, recipe):
    with pytest.raises(ConfigError, match="off where GPUs take 1 or 2 forwards in a step"):
        choose(asked, [[2, 2], [3]], recipe)


def plan(*opts, gpus=2, model=None, **asked):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_WORLD_SIZE", 2, *opts])
    return make_plan(cfg, Hardware(gpus), model=model, **asked)


def test_plan_says_it_and_why():
    content = json.loads(json.dumps(plan("MODEL.RESNETS.NORM", "BN", method="per_gpu").to_json()))
    assert content["sync_bn"] is True
    assert any("batch norm is synchronised over 2 GPUs" in note for note in content["notes"])
    assert not plan(method="per_gpu").sync_bn  # FrozenBN
    with pytest.raises(ConfigError, match="SYNC_BN is 'sometimes'"):
        plan("D2SCALE.SYNC_BN", "sometimes")


@pytest.mark.parametrize(
    ("settings", "trains"),
    [
        ({"MODEL.FPN.NORM": "BN"}, True),
        ({"model.backbone.norm": "torch.nn.BatchNorm2d"}, True),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, False),
        # Of every config that d2go writes.
        ({"MODEL.FBNET_V2.NORM": "bn", "MODEL.VT_FPN.NORM": "BN"}, False),
        ({"MODEL.FBNET_V2.NORM": "bn", "MODEL.BACKBONE.NAME": "FBNetV2C4Backbone"}, True),
    ],
)
def test_a_recipe_tells_of_batch_norm_that_trains(settings, trains):
    assert ModelFacts.of_recipe(get_cfg(), settings).batch_norm == trains


def test_sameness_wins_over_auto():
    norm = ("MODEL.RESNETS.NORM", "BN")
    kept = plan(*norm)
    assert (kept.virtual_ranks, kept.sync_bn) == (2, False)
    asked = plan(*norm, "D2SCALE.SYNC_BN", "on")
    assert (asked.virtual_ranks, asked.sync_bn) == (0, True)
    assert any("no virtual ranks with D2SCALE.SYNC_BN on" in note for note in asked.notes)
    with pytest.raises(ConfigError, match=r"auto or off with D2SCALE\.SYNC_BN on"):
        plan(*norm, "D2SCALE.SYNC_BN", "on", "D2SCALE.VIRTUAL_RANKS", "on")


def test_a_recipe_whose_synchronised_norm_is_not_wanted_may_be_cut():
    facts = ModelFacts(obstacle=SYNCHRONISED)
    with pytest.raises(ConfigError, match="the share of a GPU in one forward"):
        make_plan(_recipe(), Hardware(2, ims_per_gpu=1), model=facts)
    off = make_plan(_recipe("D2SCALE.SYNC_BN", "off"), Hardware(2, ims_per_gpu=1), model=facts)
    assert (off.sync_bn, off.accumulation_steps) == (False, 2)


def _recipe(*opts):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_WORLD_SIZE", 2, *opts])
    return cfg


def test_where_d2scale_takes_no_steps_it_cannot_be_asked_for():
    assert not plan("MODEL.RESNETS.NORM", "BN", takes_steps=False).sync_bn
    with pytest.raises(ConfigError, match="where d2scale does not take the optimizer steps"):
        plan("D2SCALE.SYNC_BN", "on", takes_steps=False)
