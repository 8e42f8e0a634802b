"""Errors of memory, injected into real ranks: no hang, and the weights of an undisturbed run."""

from __future__ import annotations

import logging

import pytest
import torch

from d2scale.launch.launch import RankError, Topology, launch
from d2scale.step import guard, undo
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.guard import AllocatorRetries, MicroBatchSize
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from norm_functions import out_of_memory_with_synchronised_norms
from rank_functions import (
    forward_backward,
    growing_training,
    guarded_training,
    one_image_does_not_fit,
    other_error_in_backward_of_the_last_rank,
    other_error_on_a_slow_rank,
    other_error_on_the_last_rank,
)
from standins import StandIn, make_samples

# A rank that waits for ever must not make the suite wait.
pytestmark = pytest.mark.timeout(240)

PARTS = ("undo", "normalizers", "forward", "backward", "optimizer")


def assert_undisturbed(found, expected):
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-10, atol=1e-12)
    for name, value in expected["momentum"].items():
        torch.testing.assert_close(found["momentum"][name], value, rtol=1e-10, atol=1e-12)
    assert found["drawn"] == expected["drawn"]
    assert found["moving"] == expected["moving"]
    for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_are_those_without_the_failure(ranks):
    # In the first step there is no momentum yet, and no moving statistic.
    failing = [(tuple(range(ranks)), 0), ((ranks - 1,), 0), ((ranks - 1,), 1), ((0,), 1)]
    twice = [(part, *at, 2) for part in PARTS for at in dict.fromkeys(failing)]
    once = [(part, (0,), 1, 1) for part in PARTS]
    cases = [None, *twice, *once]
    undisturbed, *results = launch(guarded_training, [cases], Topology(ranks))
    assert undisturbed["split_to"] == []
    for case, result in zip(twice, results, strict=False):
        assert_undisturbed(result, undisturbed)
        # 6 images on 3 ranks are 2 for each, although 4 were allowed.
        assert result["split_to"] == ([2] if ranks == 1 else [1]), case
        assert result["failures"] == 2 * (0 in case[1]), case
    # After one failure alone the step is repeated as it was: the same bits.
    for case, result in zip(once, results[len(twice) :], strict=True):
        assert (result["split_to"], result["failures"]) == ([], 1), case
        assert result["losses"] == undisturbed["losses"]
        for kind in ("weights", "momentum"):
            assert all(torch.equal(result[kind][k], v) for k, v in undisturbed[kind].items())


def test_guarded_step_is_the_plain_step():
    (result,) = launch(guarded_training, [[None]], Topology(2))
    model = StandIn(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        forward_backward(model)([make_samples(6, seed=step)])
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_image_that_does_not_fit_stops_all_ranks(ranks):
    message, same, ims_per_gpu = launch(one_image_does_not_fit, topology=Topology(ranks))
    assert f"the optimizer on rank {ranks - 1}" in message
    assert "INPUT.MAX_SIZE_TRAIN" in message
    assert "\n" not in message
    assert same
    assert ims_per_gpu == 1


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError):
        other_error_on_the_last_rank()
    with pytest.raises(RankError, match="ZeroDivisionError: a fault of the program"):
        launch(other_error_on_a_slow_rank, topology=Topology(2))


def test_another_error_ends_the_step_on_every_rank():
    kinds = launch(other_error_in_backward_of_the_last_rank, topology=Topology(2))
    assert kinds == ["AnotherRankFailedError", "ZeroDivisionError"]


def test_with_synchronised_norms_an_out_of_memory_error_ends_all_ranks():
    with pytest.raises(RankError, match="out of memory"):
        launch(out_of_memory_with_synchronised_norms, topology=Topology(2))


def test_failed_forward_holds_no_memory(caplog):
    kept = []

    class Greedy(StandIn):
        def forward(self, samples, normalizers=None):
            if len(samples) > 1:
                activation = torch.zeros(3)
                kept.append(
                    torch.multiprocessing.reductions.StorageWeakRef(activation.untyped_storage())
                )
                raise MemoryError
            assert all(reference.expired() for reference in kept)
            return super().forward(samples, normalizers)

    model = Greedy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = OptimizerStep(model, optimizer, ims_per_gpu=3)
    with caplog.at_level(logging.WARNING):
        step(make_samples(4))
    assert step.ims_per_gpu == 1
    # 4 images, 3 at a time, are 2 and 2.
    again, cut = caplog.messages
    assert "taken again, after freeing memory" in again
    assert "1 images per GPU at a time instead of 2, until 500 steps have gone well" in cut
    assert len(kept) == 2


class FailingAdamW(torch.optim.AdamW):
    """Takes its first steps, and then says that it ran out of memory."""

    def step(self, closure=None):
        super().step(closure)
        if self.failures:
            self.failures -= 1
            raise MemoryError


# Fused optimizers unscale gradients themselves, by what the scaler leaves on them.
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_scaler_and_its_step_are_undone(fused, clips):
    def train(failures):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        model = StandIn(torch.float64)
        optimizer = FailingAdamW(model.parameters(), lr=0.01, fused=fused)
        optimizer.failures = failures

        def clip(parameters):
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)

        options = StepOptions(scaler=scaler, clip=clip if clips else None)
        take_step = OptimizerStep(model, optimizer, ims_per_gpu=4, options=options)
        for step in range(3):
            take_step(make_samples(4, seed=step))
        assert take_step.ims_per_gpu == (2 if failures == 2 else 4)
        assert not {"grad_scale", "found_inf"} & {*vars(optimizer)}
        return model.state_dict(), scaler.state_dict()

    weights, scale = train(0)
    for failures in (1, 2):
        found_weights, found_scale = train(failures)
        assert found_scale == scale
        assert scale["scale"] == 128.0
        for name, value in weights.items():
            torch.testing.assert_close(found_weights[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_larger_micro_batches_are_tried_again_and_then_twice_as_late(ranks):
    cases = [("split", 0), ("split", 1), ("split", 99), ("stay_split", 99)]
    undisturbed, soon, never, stays = launch(growing_training, [cases], Topology(ranks))
    assert undisturbed["failed"] == []
    # Twice in the first step; after 3 steps the larger size is tried, once.
    assert (soon["sizes"], soon["new"]) == ([2] * 4 + [4] * 10, [2, 4])
    assert (never["sizes"], never["new"]) == ([2] * 14, [2])
    assert (never["failed"], stays["failed"]) == ([0, 0, 4, 11], [0, 0])
    for found in (soon, never, stays):
        for name, value in undisturbed["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-10, atol=1e-12)
    # A try in vain leaves no trace.
    assert all(torch.equal(never["weights"][k], v) for k, v in stays["weights"].items())


def size_after(failures, steps=0, planned=8):
    size = MicroBatchSize(planned, torch.device("cpu"))
    for _ in range(failures):
        size.after_failure(AgreedOutOfMemoryError("forward", [0], ""), size.now)
    for _ in range(steps):
        size.begin_step()
        size.end_step()
    return size


def test_a_size_grows_back_in_the_steps_in_which_it_was_cut():
    size = size_after(3, steps=501)
    assert size.now == 2
    size.begin_step()
    assert size.now == 4
    size.end_step()
    assert [size_after(3, steps).now for steps in (1002, 1003)] == [4, 8]


def test_a_resumed_run_keeps_what_is_known_of_the_size(caplog):
    state = size_after(3, steps=400).state_dict()
    same, other = (MicroBatchSize(planned, torch.device("cpu")) for planned in (8, 6))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        same.load_state_dict(state)
        other.load_state_dict(state)
    assert caplog.messages == ["2 images per GPU at a time, as before: 4 ran out of memory"]
    assert (same.now, other.now) == (2, 6)
    assert same.state_dict() == state
    for _ in range(102):
        same.begin_step()
        same.end_step()
    assert same.now == 4


def test_a_run_resumes_that_has_grown_back_to_its_largest_part():
    size = MicroBatchSize(4, torch.device("cpu"))
    for _ in range(2):  # a step of 3 images
        size.after_failure(AgreedOutOfMemoryError("forward", [0], ""), 3)
    for _ in range(502):
        size.begin_step()
        size.end_step()
    resumed = MicroBatchSize(4, torch.device("cpu"))
    resumed.load_state_dict(size.state_dict())
    assert (size.now, resumed.now) == (3, 3)


def test_a_larger_size_is_tried_whole_where_a_step_is_cut_to_measure_noise(monkeypatch):
    monkeypatch.setattr(guard, "_GROW_AFTER", 3)
    seen = []

    class Greedy(StandIn):
        def forward(self, samples, normalizers=None):
            seen.append(len(samples))
            if len(samples) > 2:
                raise MemoryError
            return super().forward(samples, normalizers)

    model = Greedy()
    step = OptimizerStep(model, torch.optim.SGD(model.parameters(), lr=0.1), ims_per_gpu=4)
    step(make_samples(4))
    while 4 not in (tried := seen[4:]):
        assert len(tried) < 20
        step(make_samples(4), measure=True)
    assert step.ims_per_gpu == 2


@pytest.mark.parametrize(("setting", "advises"), [("", True), ("expandable_segments:True", False)])
def test_fragmented_memory_is_told_with_what_helps(monkeypatch, caplog, setting, advises):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    size = MicroBatchSize(8, torch.device("cuda"))
    size.after_failure(AgreedOutOfMemoryError("forward", [0], ""), 8)
    size.end_step()
    assert size.now == 8
    assert "8 images per GPU did fit once unused memory was given back" in caplog.messages[-1]
    assert ("expandable_segments:True in the environment" in caplog.text) == advises
    # So soon after it the size is too large.
    size.after_failure(AgreedOutOfMemoryError("forward", [0], ""), 8)
    assert size.now == 4


def test_memory_is_freed_before_anything_is_restored(monkeypatch):
    model = StandIn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step_undo = undo.StepUndo(model, optimizer)
    step_undo.remember()
    model(make_samples(2))["loss_cls"].backward()
    optimizer.step()
    changed = model.stem.weight.clone()
    seen = []

    def free():
        kept = [parameter.grad for parameter in model.parameters()]
        seen.append((torch.equal(model.stem.weight, changed), set(kept), len(optimizer.state)))

    monkeypatch.setattr(undo, "free_memory", free)
    step_undo.restore()
    assert seen == [(True, {None}, 0)]
    assert not torch.equal(model.stem.weight, changed)


def test_allocator_retries_are_told_once_for_a_while(monkeypatch, caplog):
    counts = iter([1, 1, 3, 4, *[4] * 20])
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": next(counts)}
    )
    retries = AllocatorRetries(torch.device("cuda"))
    for _ in range(240):
        retries.check()
    assert ["2 times" in line or "1 times" in line for line in caplog.messages] == [True, True]
    AllocatorRetries(torch.device("cpu")).check()
