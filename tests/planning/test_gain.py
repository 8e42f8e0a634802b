from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.planning.gain import NoisePoint, efficiency, gain_of, noise_scale, steps_needed

SCALES = st.floats(0, 1e9) | st.just(math.inf)
BATCHES = st.integers(1, 4096)


@given(SCALES, BATCHES, BATCHES)
def test_a_step_is_worth_between_one_and_its_share_of_images(scale, batch, recipe):
    low, high = sorted((1.0, batch / recipe))
    assert low * (1 - 1e-12) <= gain_of(scale, batch, recipe) <= high * (1 + 1e-12)


@given(st.lists(SCALES, min_size=2, max_size=5), st.integers(9, 4096))
def test_noise_makes_a_larger_batch_worth_more(scales, batch):
    gains = [gain_of(scale, batch, 8) for scale in sorted(scales)]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(gains))


def test_the_recipes_own_batch_is_worth_exactly_one():
    assert all(gain_of(scale, 16, 16) == 1.0 for scale in (0.0, 0.3, 17.7, math.inf))


def test_efficiency_is_that_of_pollux():
    assert efficiency(30.0, 32, 8) == pytest.approx((30 + 8) / (30 + 32))


def test_signal_that_is_not_there_leaves_only_noise():
    assert noise_scale(3.0, -0.1) == math.inf
    assert noise_scale(0.0, -0.1) == 0.0
    assert noise_scale(3.0, 1.5) == 2.0


def test_steps_are_those_of_each_part_of_the_training():
    noise = [NoisePoint(50, 0.0), NoisePoint(100, math.inf), NoisePoint(150, 3.0)]
    # The first half is worth nothing more, the second four times as much.
    assert steps_needed(noise, 100, 32, 8) == 50 + 50 / 4
    # The last point stands for the rest, and one alone for all.
    assert steps_needed(noise[:1], 100, 32, 8) == 100
    assert steps_needed(noise[1:2], 200, 32, 8) == 200 / 4
