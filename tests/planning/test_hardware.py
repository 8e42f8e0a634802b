from dataclasses import replace

import pytest

from d2scale.config import load_recipe
from d2scale.errors import ConfigError, DataError
from d2scale.planning.coverage import coverage, variant
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase, dump_profiles
from d2scale.planning.plan import make_plan, refuse_more_than_all


def profile(static_gib, image_gib, covers=(), **options):
    phase = Phase("backward", int(static_gib * GIB), int(image_gib * GIB))
    return MemoryProfile((phase,), "predicted", covers=dict(covers), **options)


@pytest.fixture
def recipe(recipes):
    return load_recipe(str(recipes / "experiment-1-baseline.yaml"))


def test_a_published_recipe_needs_no_profile_of_the_users(recipe):
    cfg, settings = recipe
    hardware = Hardware.from_cfg(cfg, 2, budget_gib=16.0, settings=settings)
    assert hardware.profile is not None
    assert hardware.profile.covers["MODEL.RESNETS.DEPTH"] == 50
    assert len(hardware.variants) == 4
    plan = make_plan(cfg, hardware, method="max_memory")
    assert plan.ims_per_gpu > 8
    assert plan.predicted_peak_gib < 0.95 * 16
    assert hardware.peak_gib(plan.ims_per_gpu + 1, accumulates=False) > 0.95 * 16
    assert any("as predicted" in note for note in plan.notes)


def test_the_shipped_profile_is_not_for_another_recipe_or_engine(recipe):
    cfg, settings = recipe
    deeper = {**settings, "MODEL.FCOS.NUM_CLASSES": "80"}
    assert Hardware.from_cfg(cfg, 2, settings=deeper).profile is None
    assert Hardware.from_cfg(cfg, 2, settings=settings, engine="d2go").profile is None


def test_a_file_with_a_profile_of_another_recipe_is_refused(recipe, tmp_path):
    cfg, settings = recipe
    covers = coverage(cfg, settings)
    path = tmp_path / "profile.json"
    path.write_text(dump_profiles([profile(1, 1, {**covers, "MODEL.RESNETS.DEPTH": 101})]))
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.DEPTH is 50.*101"):
        Hardware.from_cfg(cfg, 1, settings=settings, profile_path=str(path))


@pytest.mark.parametrize(
    ("budget", "device", "message"),
    [
        (0.0, None, r"BUDGET_GIB is 0\.0; allowed: above 0 GiB"),
        (-1.0, None, "above 0 GiB"),
        (float("inf"), None, "above 0 GiB"),
        (24.0, 16.0, r"24\.0; .*at most the 16\.00 GiB of the device"),
    ],
)
def test_budgets_that_cannot_be(recipe, budget, device, message):
    with pytest.raises(ConfigError, match=message):
        Hardware.from_cfg(recipe[0], 1, budget_gib=budget, device_gib=device)


def test_without_a_budget_the_device_is_filled(recipe):
    assert Hardware.from_cfg(recipe[0], 1, device_gib=10.0).budget_gib == 10.0


@pytest.mark.parametrize(("source", "room"), [("predicted", 9.5), ("measured", 10.0)])
def test_a_prediction_keeps_a_margin_and_a_measurement_needs_none(recipe, source, room):
    made = replace(profile(1, 1), source=source)
    hardware = replace(Hardware.from_cfg(recipe[0], 1, device_gib=10.0), profile=made)
    assert hardware.room_gib == room
    assert hardware.largest_fit() == int(room) - 1


def test_ranks_and_accumulation_leave_less_room():
    room = profile(1, 1, gradient_bytes=GIB, averaging_bytes=GIB)
    assert Hardware(1, 8.0, room).largest_fit() == 7
    assert Hardware(2, 8.0, room).largest_fit() == 6
    assert Hardware(2, 8.0, room).largest_fit(accumulates=True) == 5
    assert Hardware(2, 8.0, room).peak_gib(5, accumulates=True) == 8.0


def ways(budget_gib, **gib_of_one_image):
    covers = {"precision": "32 bit", "D2SCALE.ACTIVATION_CHECKPOINTING": False}
    choices = {
        "float32": (False, False),
        "checkpointing": (False, True),
        "amp": (True, False),
        "both": (True, True),
    }
    profiles = {
        name: profile(
            1, gib_of_one_image[name] - 1, variant(covers, amp=amp, checkpointing=checkpointing)
        )
        for name, (amp, checkpointing) in choices.items()
    }
    hardware = Hardware(
        1, budget_gib, profiles["float32"], variants=tuple(profiles.values()), short_edge=800
    )
    with pytest.raises(ConfigError) as raised:
        hardware.largest_fit()
    return str(raised.value)


def test_when_nothing_fits_it_says_by_how_much_and_what_would():
    message = ways(2.0, float32=3, checkpointing=2.5, amp=1.9, both=1.5)
    assert "1.00 GiB are missing" in message
    assert "AMP (1.90 GiB), or AMP, activation checkpointing (1.50 GiB)" in message
    assert "float32, activation checkpointing" not in message
    # Half of the two GiB that go with the area: 800 / sqrt(2), down to a multiple of 32.
    assert "INPUT.MIN_SIZE_TRAIN of about 544" in message
    assert "\n" not in message


def test_when_nothing_at_all_would_fit_it_says_so():
    assert "no precision" in ways(0.9, float32=3, checkpointing=2.5, amp=1.9, both=1.5)


def test_a_total_that_does_not_fit_at_once_is_accumulated(recipe):
    cfg, _ = recipe
    room = profile(1, 1, gradient_bytes=GIB, averaging_bytes=GIB)
    plan = make_plan(cfg, Hardware(2, 10.5, room), method="keep_total")
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.predicted_peak_gib) == (8, 1, 10.0)
    plan = make_plan(cfg, Hardware(2, 9.5, room), method="keep_total")
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.predicted_peak_gib) == (4, 2, 7.0)


MADE = replace(profile(1, 1), source="measured")


def never():
    raise AssertionError("no profile is to be made here")


def for_training(cfg, make_profile=never, *, device_gib=None, **options):
    arguments = {"method": "max_memory", "engine": "an engine", **options}
    return Hardware.for_training(
        cfg, 2, device_gib=device_gib, make_profile=make_profile, **arguments
    )


def filling(recipes, *opts):
    name = str(recipes / "experiment-1-baseline.yaml")
    return load_recipe(name, ["D2SCALE.MEMORY.BUDGET_GIB", "16", *opts])[0]


def test_filling_the_memory_needs_a_profile_and_nothing_else_does(recipes):
    cfg = filling(recipes)
    assert for_training(cfg, lambda: MADE).profile is MADE
    assert for_training(cfg, method="keep_total").profile is None
    assert for_training(cfg, method=None).profile is None
    named = filling(recipes, "SOLVER.AUTO_SCALING_METHODS", "('d2scale_max_memory',)")
    assert for_training(named, lambda: MADE, method=None).profile is MADE


def test_no_profile_is_made_where_one_is_given(recipes, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(dump_profiles([profile(1, 1)]))
    given = filling(recipes, "D2SCALE.MEMORY.PROFILE", str(path))
    assert for_training(given, device_gib=16.0).profile.source == "predicted"
    assert for_training(filling(recipes, "D2SCALE.IMS_PER_GPU", "3")).ims_per_gpu == 3


def test_a_device_is_measured_even_if_a_profile_is_shipped(recipes, monkeypatch):
    shipped = profile(1, 1)
    monkeypatch.setattr("d2scale.planning.hardware.shipped_profiles", lambda: (shipped,))
    assert for_training(filling(recipes)).profile is shipped
    assert for_training(filling(recipes), lambda: MADE, device_gib=16.0).profile is MADE
    unmeasured = filling(recipes, "D2SCALE.MEMORY.PROBE", "False")
    assert for_training(unmeasured, device_gib=16.0).profile is shipped


def test_without_a_budget_nothing_can_be_filled(recipes):
    cfg = filling(recipes, "D2SCALE.MEMORY.BUDGET_GIB", "0")
    with pytest.raises(ConfigError, match="the memory of the GPU"):
        make_plan(cfg, for_training(cfg), method="max_memory")


def test_a_run_that_ends_with_faults_makes_no_profile(recipes):
    cfg = filling(recipes)
    plan = make_plan(cfg, for_training(cfg, None), method="max_memory")
    assert plan.ims_per_gpu == 2


def test_variants_are_asked_for_only_where_not_one_image_fits(recipes):
    cfg = filling(recipes)
    assert for_training(cfg, lambda: MADE, make_variants=never).variants == ()
    tight = for_training(cfg, lambda: profile(16, 1), make_variants=lambda: [MADE])
    assert tight.variants == (MADE,)


def test_a_total_batch_beyond_the_dataset_is_refused_if_it_was_chosen_here(recipes):
    cfg = filling(recipes)
    plan = make_plan(cfg, for_training(cfg, lambda: MADE), method="max_memory")
    assert plan.ims_per_batch == 30
    refuse_more_than_all(plan, 30)
    refuse_more_than_all(plan, 0)
    with pytest.raises(DataError, match=r"images in DATASETS.TRAIN is 29; .*at least the 30"):
        refuse_more_than_all(plan, 29)
    refuse_more_than_all(replace(plan, method="keep_total"), 29)
