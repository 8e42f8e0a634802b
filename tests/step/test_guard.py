"""Errors of memory, injected into real ranks: no hang, and the weights of an undisturbed run."""

from __future__ import annotations

import logging

import pytest
import torch

from d2scale.launch.launch import RankError, Topology, launch
from d2scale.step.guard import AllocatorRetries
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from rank_functions import (
    forward_backward,
    guarded_training,
    one_image_does_not_fit,
    other_error_in_backward_of_the_last_rank,
    other_error_on_the_last_rank,
)
from standins import StandIn, make_samples

# A rank that waits for ever must not make the suite wait.
pytestmark = pytest.mark.timeout(120)

PARTS = ("normalizers", "forward", "backward", "optimizer")


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
    failing = [(0,), (ranks - 1,), tuple(range(ranks))]
    # In the first step there is no momentum yet, and no moving statistic.
    cases = [
        (part, who, step) for part in PARTS for who in dict.fromkeys(failing) for step in (0, 1)
    ]
    undisturbed, *results = launch(guarded_training, [[None, *cases]], Topology(ranks))
    assert undisturbed["split_to"] == []
    for case, result in zip(cases, results, strict=True):
        assert_undisturbed(result, undisturbed)
        # 6 images on 3 ranks are 2 for each, although 4 were allowed.
        assert result["split_to"] == ([2] if ranks == 1 else [1]), case
        assert result["failures"] == (0 in case[1]), case


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
        launch(other_error_on_the_last_rank, topology=Topology(2))


def test_another_error_ends_the_step_on_every_rank():
    kinds = launch(other_error_in_backward_of_the_last_rank, topology=Topology(2))
    assert kinds == ["AnotherRankFailedError", "ZeroDivisionError"]


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
    (line,) = caplog.messages
    assert "1 images per GPU at a time instead of 2" in line
    assert len(kept) == 1


class FailingAdamW(torch.optim.AdamW):
    """Takes its first step, and then says that it ran out of memory."""

    def step(self, closure=None):
        super().step(closure)
        if not self.failures:
            self.failures.append(1)
            raise MemoryError


def test_scaler_and_its_step_are_undone():
    def train(failing):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        model = StandIn(torch.float64)
        optimizer = FailingAdamW(model.parameters(), lr=0.01)
        optimizer.failures = [] if failing else [1]

        def clip(parameters):
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)

        options = StepOptions(scaler=scaler, clip=clip)
        take_step = OptimizerStep(model, optimizer, ims_per_gpu=4, options=options)
        for step in range(3):
            take_step(make_samples(4, seed=step))
        assert take_step.ims_per_gpu == (2 if failing else 4)
        return model.state_dict(), scaler.state_dict()

    weights, scale = train(failing=False)
    found_weights, found_scale = train(failing=True)
    assert found_scale == scale
    assert scale["scale"] == 128.0
    for name, value in weights.items():
        torch.testing.assert_close(found_weights[name], value, rtol=1e-10, atol=1e-12)


def test_allocator_retries_are_told_once_for_a_while(monkeypatch, caplog):
    counts = iter([1, 1, 3, 4, *[4] * 200])
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": next(counts)}
    )
    retries = AllocatorRetries(torch.device("cuda"))
    for _ in range(202):
        retries.check()
    assert ["2 times" in line or "1 times" in line for line in caplog.messages] == [True, True]
    AllocatorRetries(torch.device("cpu")).check()
