from dataclasses import replace

import pytest

from d2scale.config import load_recipe
from d2scale.errors import ConfigError
from d2scale.planning.coverage import coverage, variant
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase, dump_profiles
from d2scale.planning.plan import make_plan


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
    assert len(hardware.alternatives) == 4
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
    hardware = Hardware.from_cfg(recipe[0], 1, device_gib=10.0, profile=made)
    assert hardware.room_gib == room
    assert hardware.largest_fit() == int(room) - 1


def test_ranks_and_accumulation_leave_less_room():
    room = profile(1, 1, gradient_bytes=GIB)
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
        1, budget_gib, profiles["float32"], alternatives=tuple(profiles.values()), short_edge=800
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
    room = profile(1, 1, gradient_bytes=GIB)
    plan = make_plan(cfg, Hardware(2, 10.5, room), method="keep_total")
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.predicted_peak_gib) == (8, 1, 10.0)
    plan = make_plan(cfg, Hardware(2, 9.5, room), method="keep_total")
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.predicted_peak_gib) == (4, 2, 7.0)
