from __future__ import annotations

import json
import logging
import math
import pickle

import pytest
import torch

from d2scale.engine.telemetry.abnormal import (
    MOST_SKIPPED_STEPS,
    NotFiniteLossError,
    SkippedSteps,
    check_finite,
    write_not_finite_step,
)
from d2scale.errors import D2ScaleError
from standins import make_samples


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(value, tmp_path):
    with pytest.raises(NotFiniteLossError, match=r"iteration 7 \(learning rate 0\.1\)") as caught:
        check_finite({"loss_cls": 1.0, "loss_loc": value}, 7, 0.1)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    write_not_finite_step(error, make_samples(2), tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "not_finite_0000007.json"
    assert json.loads(path.read_text()) == {
        "iteration": 7,
        "lr": 0.1,
        "losses": {"loss_cls": 1.0, "loss_loc": str(value)},
        "images": [
            {"image_id": 0, "file_name": "0.jpg", "rank": 0},
            {"image_id": 1, "file_name": "1.jpg", "rank": 0},
        ],
    }


def test_finite_losses_pass():
    check_finite({"loss": 0.0}, 0, 0.1)


class Scaled:
    """A parameter that trains with a scaler, on gradients as told."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        self.skipped = SkippedSteps(self.scaler)

    def step(self, iteration, gradient):
        self.skipped.check(iteration, iteration)
        self.skipped.check(iteration, iteration)  # the step is taken again
        self.optimizer.zero_grad()
        self.scaler.scale(self.weight.sum() * gradient).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_a_skipped_step_now_and_then_is_only_counted(caplog):
    scaled = Scaled()
    with caplog.at_level(logging.INFO):
        for iteration in range(4 * MOST_SKIPPED_STEPS):
            scaled.step(iteration, math.inf if iteration % 4 else 1.0)
    assert scaled.skipped.total == 3 * MOST_SKIPPED_STEPS - 1
    assert "iteration 1 left the weights alone" in caplog.text


def test_step_after_step_skipped_ends_the_run():
    scaled = Scaled()
    for iteration in range(MOST_SKIPPED_STEPS):
        scaled.step(iteration, math.inf)
    with pytest.raises(D2ScaleError, match="overflowed in 20 steps in a row, up to iteration 19"):
        scaled.step(MOST_SKIPPED_STEPS, math.inf)
