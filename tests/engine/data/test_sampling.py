from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2scale.engine.data.sampling import (
    Draw,
    StepSampler,
    epoch_order,
    rank_slice,
    uniform_numbers,
)
from d2scale.errors import CheckpointError

# Of seed 3. Runs are continued under other versions of numpy: these must not change.
GOLDEN_ORDERS = [[5, 7, 2, 1, 6, 3, 4, 0], [5, 2, 6, 0, 7, 4, 3, 1]]
GOLDEN_NUMBERS = [0.17900638706002792, 0.8359782531903923]


def alternating_groups(size):
    return np.arange(size) % 3 // 2


def take(sampler, steps):
    return list(itertools.islice(sampler, steps))


def draws(steps):
    return [draw for step in steps for draw in step]


def assert_epochs_are_whole(shown, size):
    """Every image at most once an epoch, and no epoch with a hole but those still open."""
    assert len(set(shown)) == len(shown)
    per_epoch = {epoch: {d.image for d in shown if d.epoch == epoch} for _, epoch in shown}
    return [epoch for epoch, images in per_epoch.items() if len(images) == size]


def test_order_is_a_fixed_function_of_seed_and_epoch():
    assert [epoch_order(8, 3, epoch).tolist() for epoch in (0, 1)] == GOLDEN_ORDERS
    assert uniform_numbers(3, 1, 7, 2).tolist() == GOLDEN_NUMBERS


def test_steps_walk_through_whole_epochs():
    steps = take(StepSampler(10, 4, seed=1), 5)
    assert all(len(step) == 4 for step in steps)
    shown = draws(steps)
    assert [d.epoch for d in shown] == [0] * 10 + [1] * 10
    for epoch in (0, 1):
        assert [d.image for d in shown if d.epoch == epoch] == epoch_order(10, 1, epoch).tolist()


def test_a_step_may_be_larger_than_the_dataset():
    step = next(StepSampler(3, 8, seed=0))
    assert sorted(step) == sorted(
        [Draw(i, e) for e in (0, 1) for i in range(3)]
        + [Draw(int(i), 2) for i in epoch_order(3, 0, 2)[:2]]
    )


def test_groups_do_not_mix_and_nothing_is_lost():
    groups = alternating_groups(30)
    steps = take(StepSampler(30, 4, seed=5, groups=groups), 60)
    assert all(len({groups[d.image] for d in step}) == 1 for step in steps)
    assert {groups[step[0].image] for step in steps} == {0, 1}
    assert len(assert_epochs_are_whole(draws(steps), 30)) >= 6


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    first=st.integers(1, 12),
    second=st.integers(1, 12),
    steps=st.integers(0, 12),
    grouped=st.booleans(),
)
def test_continuing_with_another_batch_shows_each_image_once(size, first, second, steps, grouped):
    groups = alternating_groups(size) if grouped else None
    before = StepSampler(size, first, seed=2, groups=groups)
    shown = draws(take(before, steps))
    state = json.loads(json.dumps(before.state_dict()))
    after = StepSampler(size, second, seed=99, groups=groups)
    after.load_state_dict(state)
    assert after.seed == 2
    waiting = {Draw(*draw) for draw in state["waiting"]}
    assert len(shown) + len(waiting) == state["epoch"] * size + state["position"]
    more = draws(take(after, 4 * size // second + 4))
    # What waited comes before anything of its own group that was drawn later.
    assert len(set(shown + more)) == len(shown + more)
    reached = after.state_dict()
    everything = set(shown + more) | {Draw(*draw) for draw in reached["waiting"]}
    assert everything == {
        Draw(int(i), epoch)
        for epoch in range(reached["epoch"] + 1)
        for i in epoch_order(size, 2, epoch)[
            : reached["position"] if epoch == reached["epoch"] else None
        ]
    }


@pytest.mark.parametrize("grouped", [False, True])
def test_a_saved_state_continues_the_same_steps(grouped):
    groups = alternating_groups(20) if grouped else None
    undisturbed = take(StepSampler(20, 6, seed=4, groups=groups), 14)
    first = StepSampler(20, 6, seed=4, groups=groups)
    taken = take(first, 5)
    second = StepSampler(20, 6, seed=0, groups=groups)
    second.load_state_dict(first.state_dict())
    assert taken + take(second, 9) == undisturbed


def test_a_state_may_lose_or_gain_its_groups():
    grouped = StepSampler(20, 6, seed=3, groups=alternating_groups(20))
    shown = draws(take(grouped, 3))
    plain = StepSampler(20, 6, seed=3)
    plain.load_state_dict(grouped.state_dict())
    assert len(assert_epochs_are_whole(shown + draws(take(plain, 4)), 20)) >= 1


def test_state_of_another_dataset_is_refused():
    state = StepSampler(20, 6, seed=3).state_dict()
    with pytest.raises(CheckpointError, match=r"sampler.size is 20; allowed: 21, the images"):
        StepSampler(21, 6, seed=3).load_state_dict(state)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        StepSampler(*arguments)


def test_wrong_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="3 group numbers for 4 images"):
        StepSampler(4, 2, 0, groups=np.zeros(3, dtype=int))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_a_step_without_overlap(world_size):
    step = next(StepSampler(50, 16, seed=0))
    parts = [step[rank_slice(16, world_size, rank)] for rank in range(world_size)]
    assert tuple(itertools.chain(*parts)) == step
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_numbers_of_an_image_are_its_own():
    keys = [(seed, epoch, image) for seed in (0, 1) for epoch in range(5) for image in range(50)]
    numbers = np.array([uniform_numbers(*key, 2) for key in keys])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.15
