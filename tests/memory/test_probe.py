import copy
import random
from dataclasses import replace
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2scale.launch.launch import RankError, Topology, launch
from d2scale.memory.devices import SimulatedDevice
from d2scale.memory.predict import predict
from d2scale.memory.probe import Probe, measured_profile
from d2scale.memory.search import MAX_TRIALS
from d2scale.planning.memory_profile import Phase
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.out_of_memory import OutOfMemoryError
from small_training import (
    WORST_CASE,
    averaging_in_a_trial,
    measure,
    measure_on_devices_of,
    measure_on_ranks,
    profile_where_one_rank_has_room,
    workload,
)

CPU = torch.device("cpu")
KIB = 1024


def fits(budget_bytes: int, images: int) -> bool:
    """Whether steps of the worst case run within the budget, by trying it alone."""
    work = workload()
    step = work.build_step(CPU)
    device = SimulatedDevice(budget_bytes)
    batches = work.trial_batches(images)  # in the machine's memory
    step.ims_per_gpu = images
    try:
        with device.limited(budget_bytes, step.held_tensors()):
            for batch in batches:
                step.attempt(batch)
    except (AgreedOutOfMemoryError, OutOfMemoryError):
        return False
    return True


@settings(max_examples=5, deadline=None)
@given(st.integers(400, 11_000))
def test_whatever_the_budget_the_largest_that_trains_is_found(budget_kib):
    work = workload()
    measurement = measure(budget_kib * KIB, work.build_step(CPU), work)
    assert fits(budget_kib * KIB, measurement.largest)
    assert not fits(budget_kib * KIB, measurement.largest + 1)
    assert len(measurement.trials) <= 3


@settings(max_examples=5, deadline=None)
@given(st.integers(600, 11_000), st.floats(0.95, 1.05), st.integers(0, 2**25))
def test_a_prediction_that_is_off_is_corrected_by_what_was_measured(budget_kib, slope, constant):
    budget = budget_kib * KIB
    work = workload()
    right = predict(work).profile(work, caching=False)
    off = replace(
        right,
        phases=tuple(
            Phase(p.name, p.static_bytes + constant, round(slope * p.bytes_per_image))
            for p in right.phases
        ),
    )
    probe = Probe(SimulatedDevice(budget), work.build_step(CPU), work.trial_batches)
    measurement = probe.measure(off, budget)
    assert fits(budget, measurement.largest)
    assert not fits(budget, floor(measurement.largest / 0.97) + 1)
    assert len(measurement.trials) <= MAX_TRIALS


def everything(step):
    """All that a step can change, as values."""
    return copy.deepcopy(
        {
            "weights": step.model.state_dict(),
            "gradients": [p.grad for p in step.model.parameters()],
            "modes": [module.training for module in step.model.modules()],
            "optimizer": step.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1],
            "python": random.getstate(),
        }
    )


def assert_same(before, after):
    assert before["python"] == after["python"]
    del before["python"], after["python"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_left_behind(trained):
    work = workload()
    step = work.build_step(CPU)
    if trained:
        step.attempt(WORST_CASE.samples(2))
        for parameter in step.model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        step.model.body[3].eval()
    before = everything(step)
    measurement = measure(1300 * KIB, step, work)
    assert {trial.fits for trial in measurement.trials} == {True, False}
    assert_same(before, everything(step))


def test_a_model_that_fails_for_another_reason_is_heard_untouched():
    work = workload(fails_at=2)
    step = work.build_step(CPU)
    before = everything(step)
    with pytest.raises(ZeroDivisionError, match=r"^a fault of the model$"):
        measure(1300 * KIB, step, work)
    assert_same(before, everything(step))


def test_no_more_than_wanted_is_tried():
    work = workload()
    measurement = measure(3000 * KIB, work.build_step(CPU), work, limit=2)
    assert measurement.largest == 2
    assert max(trial.ims_per_gpu for trial in measurement.trials) == 2


def test_the_measured_profile_says_what_was_measured():
    work = workload()
    budget = 1300 * KIB
    measurement = measure(budget, work.build_step(CPU), work)
    profile = measured_profile(predict(work).profile(work, caching=False), measurement, "in a test")
    assert (profile.source, profile.description) == ("measured", "in a test")
    assert profile.largest_ims_per_gpu(budget) == measurement.largest
    assert profile.largest_ims_per_gpu(budget // 2) < measurement.largest
    assert {point.ims_per_gpu for point in profile.points} == {
        trial.ims_per_gpu for trial in measurement.trials if trial.fits
    }


def test_where_one_image_does_not_fit_the_profile_says_so():
    work = workload()
    budget = 60 * KIB
    measurement = measure(budget, work.build_step(CPU), work)
    assert measurement.largest == 0
    assert "in use" in measurement.trials[-1].reason
    predicted = predict(work).profile(work, caching=False)
    too_small = replace(predicted, phases=(Phase("forward", 0, 1),))
    for profile in (predicted, too_small):
        assert measured_profile(profile, measurement, "").peak_bytes(1) > budget


def test_what_others_take_of_the_device_leaves_less_room():
    work = workload()
    predicted = predict(work).profile(work, caching=False)
    budget = 3000 * KIB
    alone = Probe(SimulatedDevice(budget), work.build_step(CPU), work.trial_batches)
    shared = replace(alone, device=SimulatedDevice(budget, context_bytes=1500 * KIB))
    assert (
        shared.measure(predicted, budget).largest
        == alone.measure(predicted, budget - 1500 * KIB).largest
        < alone.measure(predicted, budget).largest
    )


def test_all_ranks_agree_on_what_the_smallest_can_hold():
    first, second = launch(measure_on_ranks, [(3000 * KIB, 1000 * KIB)], Topology(2))
    assert first.largest == second.largest >= 1
    assert first.trials == second.trials
    assert {trial.fits for trial in first.trials} == {True, False}
    # The averaging buffers take their part of the smaller rank's room.
    work = workload()
    alone = measure(1000 * KIB, work.build_step(CPU), work)
    assert first.largest <= alone.largest


def test_devices_of_different_sizes_lead_to_one_answer():
    first, second = launch(measure_on_devices_of, [(3000 * KIB, 1000 * KIB)], Topology(2))
    assert first == second
    assert first.budget_bytes == 1000 * KIB


def test_a_rank_with_room_learns_why_another_has_none():
    profiles = launch(profile_where_one_rank_has_room, [60 * KIB], Topology(2))
    assert profiles[0] == profiles[1]
    assert profiles[0].largest_ims_per_gpu(60 * KIB, world_size=2) == 0


def test_a_trial_holds_the_averaging_buffers():
    held, expected = launch(averaging_in_a_trial, [], Topology(2))
    assert held == expected > 0


def test_a_rank_that_fails_leaves_no_other_waiting_and_is_named():
    with pytest.raises(RankError, match="a fault of the model"):
        launch(measure_on_ranks, [(3000 * KIB, 3000 * KIB), 1], Topology(2))
