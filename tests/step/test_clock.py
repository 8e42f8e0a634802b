from __future__ import annotations

import math

import pytest
import torch

from d2scale.step.clock import StepClock
from d2scale.step.micro_batches import StepLosses


def losses(images=8, weighted=None, total=1.0, parts=2):
    """Losses of a step that has measured these squares, None: nothing."""
    squares = None if weighted is None else torch.tensor([weighted, total, parts]).double()
    return StepLosses(("loss",), torch.ones(1).double(), images, squares)


def take(clock, *args, **kwargs):
    gain = clock.gain_with(losses(*args, **kwargs))
    clock.advance()
    return gain


def test_without_the_rule_every_step_is_worth_one():
    clock = StepClock()
    assert [take(clock, 8, 9.0), take(clock, 6)] == [1.0, 1.0]
    assert (clock.steps, clock.iterations, clock.recipe_images) == (2, 2.0, 14)
    assert (clock.iteration, clock.number) == (1, 2)
    assert clock.noise_scale == math.inf


def test_a_step_of_the_recipes_batch_is_worth_exactly_one():
    clock = StepClock(recipe_ims_per_batch=8)
    for weighted in (1.5, 2.0, 1e9, None):
        assert take(clock, 8, weighted) == 1.0
    assert clock.iterations == 4.0


def test_a_larger_batch_is_worth_what_its_noise_says():
    clock = StepClock(recipe_ims_per_batch=4)
    # V = 8 * (1.5 - 1) = 4, M2 = 1 - 4 / 8 = 0.5: r = (4 / 4 + 0.5) / (4 / 8 + 0.5).
    assert take(clock, 8, 1.5) == pytest.approx(1.5)
    assert clock.noise_scale == pytest.approx(8.0)
    # What does not measure goes by the average.
    assert take(clock, 8) == pytest.approx(1.5)
    assert clock.iterations == pytest.approx(3.0)
    assert (clock.steps, clock.number, clock.iteration) == (2, 2, 2)


def test_negative_signals_are_averaged_and_only_then_limited():
    clock = StepClock(recipe_ims_per_batch=4)
    assert take(clock, 8, 3.0) == 2.0  # M2 = 1 - 16 / 8
    for _ in range(60):
        gain = take(clock, 8, 1.25)  # V = 2, M2 = 0.75
    assert gain == pytest.approx((2 / 4 + 0.75) / (2 / 8 + 0.75), rel=0.02)


def test_before_the_first_measurement_it_is_cautious():
    assert take(StepClock(recipe_ims_per_batch=4), 8) == 1.0
    assert take(StepClock(recipe_ims_per_batch=16), 8) == 0.5


def test_a_step_that_is_taken_again_counts_once():
    clock, once = StepClock(recipe_ims_per_batch=4), StepClock(recipe_ims_per_batch=4)
    clock.gain_with(losses(8, 3.0))
    take(clock, 8, 1.5)
    take(once, 8, 1.5)
    assert clock.state_dict() == once.state_dict()


def test_rounding_takes_no_step_more():
    clock = StepClock(recipe_ims_per_batch=49, max_iter=10)
    while clock.iterations < 10:
        take(clock, 1, 3.0)  # nothing but noise
    assert clock.steps == 490


def test_the_last_step_ends_in_the_last_iteration():
    clock = StepClock(recipe_ims_per_batch=2, max_iter=3)
    take(clock, 8, 3.0)
    assert clock.iterations == 4.0
    assert clock.iteration == 2


def test_a_long_training_is_measured_seldom():
    def measured(clock, steps, one_part):
        count = 0
        for _ in range(steps):
            count += clock.measures(one_part=one_part)
            take(clock, 8, 1.5)
        return count

    assert measured(StepClock(recipe_ims_per_batch=4, max_iter=90000), 1020, True) == 20 + 100
    assert measured(StepClock(recipe_ims_per_batch=4, max_iter=300), 100, True) == 100
    # Without the rule a step is never cut, and measured only now and then.
    assert measured(StepClock(measured_period=20), 100, True) == 0
    assert measured(StepClock(measured_period=20), 100, False) == 5
    assert measured(StepClock(), 100, False) == 0


def test_resuming_goes_on_bit_for_bit():
    whole = StepClock(recipe_ims_per_batch=3)
    for weighted in (1.5, 1.7, 1.3):
        take(whole, 8, weighted)
    resumed = StepClock(recipe_ims_per_batch=3)
    state = whole.state_dict()
    resumed.resume(state["recipe_images"] / 3, state["recipe_images"], state)
    for clock in (whole, resumed):
        take(clock, 8, 1.1)
    assert whole.state_dict() == resumed.state_dict()
    assert whole.iterations == resumed.iterations
