"""The rules as properties: whatever the recipe, what must stay stays."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.planning import rules

batches = st.integers(1, 4096)
counts = st.integers(0, 10**7)
lengths = st.integers(1, 10**7)


@given(batches, batches, lengths)
def test_max_iter_shows_at_least_the_images_and_less_than_a_batch_more(b0, b, max_iter):
    scaled = rules.scale_max_iter(max_iter, Fraction(b, b0))
    assert 0 <= scaled * b - max_iter * b0 < b


@given(batches, batches, counts)
def test_counts_keep_their_images_to_within_one_batch_and_never_become_0(b0, b, count):
    scaled = rules.scale_count(count, Fraction(b, b0))
    assert (scaled == 0) == (count == 0)
    assert abs(scaled * b - count * b0) <= b


@given(batches, batches, lengths, st.lists(lengths, max_size=6, unique=True))
def test_steps_stay_strictly_increasing_below_max_iter(b0, b, max_iter, steps):
    steps = sorted(step for step in steps if step < max_iter)
    ratio = Fraction(b, b0)
    new_max_iter = rules.scale_max_iter(max_iter, ratio)
    if steps and len(steps) >= new_max_iter:
        with pytest.raises(ValueError, match="do not fit"):
            rules.scale_steps(steps, ratio, new_max_iter)
        return
    scaled = rules.scale_steps(steps, ratio, new_max_iter)
    assert len(scaled) == len(steps)
    assert all(a < b for a, b in zip((0, *scaled), (*scaled, new_max_iter), strict=True))


@given(batches, batches, lengths)
def test_steps_keep_their_images_where_there_is_room(b0, b, step):
    ratio = Fraction(b, b0)
    max_iter = rules.scale_max_iter(step * 4, ratio)
    if max_iter > 8:
        (scaled,) = rules.scale_steps([step], ratio, max_iter)
        assert abs(scaled * b - step * b0) <= b


@given(batches, batches, st.floats(1e-6, 10), st.sampled_from(["linear", "sqrt", "none"]))
def test_learning_rate_there_and_back_is_the_identity(b0, b, lr, rule):
    there = rules.scale_learning_rate(lr, Fraction(b, b0), rule)
    back = rules.scale_learning_rate(there, Fraction(b0, b), rule)
    assert back == pytest.approx(lr, rel=1e-12)


@given(batches, batches, lengths)
def test_length_there_and_back_is_the_identity_up_to_a_batch_of_each(b0, b, max_iter):
    there = rules.scale_max_iter(max_iter, Fraction(b, b0))
    back = rules.scale_max_iter(there, Fraction(b0, b))
    assert 0 <= (back - max_iter) * b0 < b + b0


@given(batches, batches, st.floats(0.5, 0.99999))
def test_ema_forgets_as_much_per_image(b0, b, decay):
    scaled = rules.scale_ema_decay(decay, Fraction(b, b0))
    if b / b0 * math.log10(decay) < -300:
        assert 0 <= scaled <= 1e-300  # more than a double can tell from 0
        return
    assert scaled ** (1 / b) == pytest.approx(decay ** (1 / b0), rel=1e-9)


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 64))
def test_micro_batches_cover_the_step_evenly(total, world_size, ims_per_gpu):
    total = max(total, world_size)
    sizes = rules.micro_batch_sizes(total, world_size, ims_per_gpu)
    assert sum(map(sum, sizes)) == total
    assert len(sizes) == world_size
    shares = [sum(rank) for rank in sizes]
    assert max(shares) - min(shares) <= 1
    for rank in sizes:
        assert 1 <= min(rank) <= max(rank) <= ims_per_gpu
        assert len(rank) == -(-sum(rank) // ims_per_gpu)


@pytest.mark.parametrize(
    ("rule", "expected"), [("linear", 0.01875), ("sqrt", 0.01 * 1.875**0.5), ("none", 0.01)]
)
def test_learning_rate_rules(rule, expected):
    assert rules.scale_learning_rate(0.01, Fraction(30, 16), rule) == expected


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("sgd", "linear"), ("SGD_MT", "linear"), ("adamw", "sqrt"), ("adam", "sqrt"), ("x", "linear")],
)
def test_auto_follows_the_optimizer(optimizer, expected):
    assert rules.resolve_lr_rule("auto", optimizer) == expected
    assert rules.resolve_lr_rule("none", optimizer) == "none"


def test_an_uneven_split_puts_the_larger_shares_first():
    assert rules.split_evenly(16, 3) == (6, 5, 5)
    assert rules.micro_batch_sizes(16, 3, 4) == ((3, 3), (3, 2), (3, 2))


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_numbers_of_micro_batches_are_those_that_can_be_made(images, ims_per_gpu):
    made = {len(rules.micro_batch_sizes(images, 1, size)[0]) for size in range(1, ims_per_gpu + 1)}
    counts = rules.micro_batch_counts(images, ims_per_gpu)
    assert counts == tuple(sorted(made))
    for count in counts:
        assert len(rules.micro_batch_sizes(images, 1, -(-images // count))[0]) == count
