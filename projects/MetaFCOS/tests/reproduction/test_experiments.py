import pytest

from d2scale.config import load_cfg
from d2scale.errors import ConfigError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from meta_fcos.reproduction.experiments import (
    BASELINE,
    GAIN,
    LARGE_BATCH,
    PUBLISHED,
    SAME_BATCH,
    chosen,
    images_of,
    length_faults,
    length_settings,
)


def full(experiment, third="published"):
    return load_cfg(experiment.recipe("full", third))


def test_a_cut_training_keeps_every_part_of_its_schedule():
    found = length_settings(full(BASELINE), 48000)
    assert found["SOLVER.MAX_ITER"] == 3000
    assert found["SOLVER.STEPS"] == (2000, 2500)
    assert found["SOLVER.WARMUP_ITERS"] == 100
    assert found["TEST.EVAL_PERIOD"] == 0
    assert found["SOLVER.CHECKPOINT_PERIOD"] == 200


def test_a_training_of_full_length_only_saves_more_often():
    found = length_settings(full(BASELINE), None)
    assert found == {"SOLVER.CHECKPOINT_PERIOD": 2000, "WRITER_PERIOD": 20}


@pytest.mark.parametrize("third", ["published", "exact"])
@pytest.mark.parametrize("images", [61, 1000, 48000, 450000])
def test_all_see_the_same_images_up_to_their_last_step(images, third):
    for experiment in PUBLISHED:
        cfg = full(experiment, third)
        settings = length_settings(cfg, images)
        seen = settings["SOLVER.MAX_ITER"] * cfg.SOLVER.IMS_PER_BATCH
        assert images <= seen < images + cfg.SOLVER.IMS_PER_BATCH
        assert settings["SOLVER.STEPS"][-1] < settings["SOLVER.MAX_ITER"]


def test_lengths_out_of_range_are_refused_with_the_range():
    recipes = [full(each) for each in PUBLISHED]
    for images in (0, -5, 60, 450001):
        (fault,) = length_faults(images, recipes)
        assert "61" in fault.allowed
        assert "450000" in fault.allowed
    assert length_faults(61, recipes) == []


def test_a_short_training_tells_its_loss_often_enough_to_know_its_noise():
    assert length_settings(load_cfg(BASELINE.recipe("small", "")), None)["WRITER_PERIOD"] == 5
    assert length_settings(load_cfg(BASELINE.recipe("small", "")), 48)["WRITER_PERIOD"] == 1


def test_only_known_experiments_are_chosen():
    assert chosen(None) == (BASELINE, SAME_BATCH, LARGE_BATCH)
    assert chosen("3, 1") == (BASELINE, LARGE_BATCH)
    assert chosen("3,gain") == (GAIN, LARGE_BATCH)
    with pytest.raises(ConfigError, match="--only is '1,4'; allowed: some of 1, 2, 3, gain,"):
        chosen("1,4")


@pytest.mark.parametrize("form", ["full", "small"])
def test_the_shortest_length_leaves_the_gain_rule_a_step_for_each_learning_rate(form):
    cfg = load_cfg(GAIN.recipe(form, ""))
    least = next(images for images in range(1, 99) if not length_faults(images, [cfg]))
    assert least == {"full": 61, "small": 33}[form]
    cfg.merge_from_list([part for pair in length_settings(cfg, least).items() for part in pair])
    hardware = Hardware(2, ims_per_gpu=cfg.D2SCALE.IMS_PER_GPU)
    assert make_plan(cfg, hardware).steps[0] == 3


@pytest.mark.parametrize(
    ("recipe", "large", "ims_per_gpu"),
    [
        (BASELINE.recipe("full", ""), LARGE_BATCH.recipe("full", "exact"), 15),
        (BASELINE.recipe("small", ""), LARGE_BATCH.recipe("small", ""), 8),
    ],
)
def test_the_exact_large_batch_is_what_max_memory_plans(recipe, large, ims_per_gpu):
    cfg = load_cfg(recipe)
    hardware = Hardware(2, ims_per_gpu=ims_per_gpu)
    planned = make_plan(cfg, hardware, method="max_memory", lr_rule="linear").apply(cfg)
    shipped = load_cfg(large)
    assert shipped.SOLVER == planned.SOLVER
    assert shipped.TEST == planned.TEST
    assert shipped.INPUT == planned.INPUT
    assert images_of(shipped) == images_of(cfg)


@pytest.mark.parametrize(
    "recipe",
    [
        LARGE_BATCH.recipe("full", "published"),
        LARGE_BATCH.recipe("full", "exact"),
        LARGE_BATCH.recipe("small", ""),
    ],
)
def test_the_published_large_batch_names_its_rule_itself(recipe):
    # On other GPUs too, where auto would take the gain rule.
    plan = make_plan(load_cfg(recipe), Hardware(4, ims_per_gpu=15), method="max_memory")
    assert plan.lr_rule == "linear"
