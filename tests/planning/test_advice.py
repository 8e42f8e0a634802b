from __future__ import annotations

import math

import pytest

from d2scale.planning.advice import Candidate, advise
from d2scale.planning.gain import NoisePoint, typical_noise_scale

# A step of 16 images is worth (8/8 + 1) / (8/16 + 1) = 4/3 of the recipe's, one of 32 8/5.
EIGHT = [NoisePoint(100, 8.0)]


def candidate(ims_per_batch, speed, **others):
    values = {"world_size": 1, "ims_per_gpu": ims_per_batch, "setting": "float32", **others}
    return Candidate(ims_per_batch, images_per_second=speed, **values)


def advice_of(*candidates, noise=EIGHT, max_iter=100):
    return advise(candidates, noise, max_iter=max_iter, recipe_ims_per_batch=8)


def by_batch(advice):
    return {row.candidate.ims_per_batch: row for row in advice.rows}


def test_every_batch_gets_the_steps_images_and_time_that_its_gain_asks_for():
    rows = by_batch(advice_of(candidate(8, 10.0), candidate(16, 16.0), candidate(32, 20.0)))
    assert [row.steps for row in rows.values()] == [100, 75, 63]  # 62.5
    assert [row.images for row in rows.values()] == [800, 1200, 63 * 32]
    assert [row.efficiency for row in rows.values()] == pytest.approx([1, 2 / 3, 0.4])
    assert [row.seconds for row in rows.values()] == pytest.approx([80, 75, 100])


def test_the_best_is_named_with_what_it_saves_and_why():
    advice = advice_of(candidate(8, 10.0), candidate(16, 16.0), candidate(32, 20.0))
    assert advice.best.candidate.ims_per_batch == 16
    assert advice.reason == (
        "16 images a step save 6 % against the recipe's 8: they show 60 % more images a second and "
        "need 50 % more images; above 8 images a step, the median noise scale, the noise is no "
        "longer the limit"
    )


def test_a_full_memory_is_called_so():
    advice = advice_of(candidate(8, 10.0), candidate(16, 20.0, fills_memory=True))
    assert advice.reason.startswith("filling the memory with 16 images a step saves 25 % against")


def test_the_recipes_own_batch_may_be_best():
    advice = advice_of(candidate(8, 10.0), candidate(16, 11.0))
    assert advice.best.candidate.ims_per_batch == 8
    assert advice.reason.startswith(
        "the recipe's own batch of 8 is best: 16 images a step, the next, show 10 % more images a "
        "second and need 50 % more images; "
    )
    assert advice_of(candidate(8, 1.0)).reason.startswith(
        "the recipe's own batch of 8 is best: no other batch was measured"
    )


def test_a_gain_within_the_error_of_timing_does_not_change_a_recipe():
    assert advice_of(candidate(8, 10.0), candidate(16, 15.2)).best.candidate.ims_per_batch == 8
    assert advice_of(candidate(8, 10.0), candidate(16, 15.4)).best.candidate.ims_per_batch == 16


def test_a_smaller_batch_needs_the_recipes_images():
    """By the linear rule: by the gain rule it loses quality."""
    advice = advice_of(candidate(8, 10.0), candidate(4, 12.5))
    smaller = by_batch(advice)[4]
    assert (smaller.steps, smaller.images, smaller.efficiency) == (200, 800, 1.0)
    assert advice.reason.startswith(
        "4 images a step save 20 % against the recipe's 8: they show 25 % more images a second "
        "and need 0.0 % more images; "
    )


def test_without_the_recipes_batch_nothing_is_saved_for_certain():
    advice = advice_of(candidate(16, 16.0))
    recipe = by_batch(advice)[8]
    assert (recipe.seconds, recipe.candidate.images_per_second) == (None, None)
    assert "what they save is not known" in advice.reason


def test_other_settings_are_compared_in_their_own_and_named_otherwise():
    amp = candidate(16, 32.0, setting="AMP")
    assert "against the recipe's 8 in float32 on 1 GPU:" in (
        advice_of(candidate(8, 10.0), amp).reason
    )
    same = advice_of(candidate(8, 10.0), amp, candidate(8, 20.0, setting="AMP"))
    assert "save 6 % against the recipe's 8: they" in same.reason


def test_what_was_not_measured_is_told():
    def told(*settings):
        notes = advice_of(*(candidate(8, 1.0, setting=setting) for setting in settings)).notes
        return [note for note in notes if note.startswith("not measured")]

    assert told("float32") == ["not measured: AMP, activation checkpointing"]
    assert told("AMP") == ["not measured: float32, activation checkpointing"]
    assert told("float32", "AMP, activation checkpointing") == []


def test_noise_of_the_beginning_is_called_what_it_is():
    notes = advice_of(candidate(8, 1.0), noise=[NoisePoint(20, 8.0)]).notes
    (note,) = (note for note in notes if "first" in note)
    assert note.startswith("the noise covers the first 20 of 100 steps of the recipe; it grows")
    assert note.endswith("a larger batch is worth at least that")
    assert not any("first" in note for note in advice_of(candidate(8, 1.0)).notes)


@pytest.mark.parametrize(("scale", "named"), [(90.0, " 90 images,"), (math.inf, "")])
def test_noise_above_all_measured_batches_is_told(scale, named):
    advice = advice_of(candidate(8, 1.0), candidate(16, 2.0), noise=[NoisePoint(100, scale)])
    assert advice.reason.endswith(
        f"the median noise scale{',' if named else ''}{named} lies above all measured batches, so "
        "a still larger one may save more"
    )


def test_measurements_of_one_batch_are_joined_to_their_median():
    speeds = {"a": 10, "b": 30, "c": 11}
    (row,) = advice_of(*(candidate(8, speeds[name], source=name) for name in speeds)).rows
    assert row.candidate.images_per_second == 11
    assert row.candidate.source == "a, b, c"


def test_speeds_that_cannot_both_be_true_are_told():
    one, other = (candidate(images, 10.0 * images, ims_per_gpu=4) for images in (8, 16))
    (note,) = (note for note in advice_of(one, other).notes if "busy" in note)
    assert note.startswith("4 images per GPU in float32 did 80 to 160 images a second: the machine")
    amp = candidate(16, 100.0, ims_per_gpu=4, setting="AMP")
    assert not any("busy" in note for note in advice_of(one, amp).notes)


def test_a_batch_that_was_trained_takes_the_steps_that_its_own_noise_gave():
    own = candidate(16, 16.0, noise=(NoisePoint(100, math.inf),))
    advice = advice_of(candidate(8, 10.0), own, candidate(32, 20.0))
    assert [row.steps for row in advice.rows] == [100, 50, 63]
    assert any("its own noise" in note for note in advice.notes)
    assert not any("its own noise" in note for note in advice_of(candidate(8, 1.0)).notes)


def test_json_says_what_the_table_does():
    noise = [NoisePoint(50, 8.0), NoisePoint(100, math.inf)]
    content = advice_of(candidate(8, 10.0), candidate(16, 16.0), noise=noise).to_json()
    assert content["noise"] == [[50, 8.0], [100, None]]
    assert content["best"] == content["rows"][1]
    assert content["rows"][0] == {
        "ims_per_batch": 8,
        "world_size": 1,
        "ims_per_gpu": 8,
        "setting": "float32",
        "images_per_second": 10.0,
        "source": "",
        "fills_memory": False,
        "steps": 100,
        "images": 800,
        "efficiency": 1.0,
        "seconds": 80.0,
    }
    assert (content["max_iter"], content["recipe_ims_per_batch"]) == (100, 8)


def test_the_median_noise_scale_counts_every_step_of_the_training():
    noise = [NoisePoint(10, 100.0), NoisePoint(60, 5.0), NoisePoint(100, math.inf)]
    assert typical_noise_scale(noise, 100) == 5.0
    assert typical_noise_scale(noise, 40) == 5.0
    # The last one stands for the rest.
    assert typical_noise_scale(noise, 1000) == math.inf
    assert typical_noise_scale(noise[:1], 1000) == 100.0
