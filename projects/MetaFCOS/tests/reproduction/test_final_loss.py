import json
import math

import numpy as np
import pytest

from d2scale.report.history import read_history
from meta_fcos.reproduction.final_loss import FinalLoss, compare, final_loss
from meta_fcos.reproduction.summary import _final_loss
from run_folders import gain_lines


def test_the_final_loss_is_the_mean_of_the_last_sixth_with_its_standard_error():
    images = [10.0 * step for step in range(1, 61)]
    losses = [9.0] * 50 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    found = final_loss(images, losses)
    assert found.points == 10
    assert found.mean == 5.5
    assert found.error == pytest.approx(np.std(losses[50:], ddof=1) / math.sqrt(10))


def test_the_noise_of_two_values_is_not_known():
    found = final_loss([1.0, 2.0], [4.0, 5.0])
    assert math.isnan(found.error)
    assert "too short" in compare(found, FinalLoss(5.0, 0.1, 10))
    assert final_loss([], []) is None


def test_trainings_that_differ_by_noise_alone_agree_nearly_always():
    rng = np.random.default_rng(0)
    images = [8.0 * step for step in range(1, 241)]
    verdicts = []
    for _ in range(200):
        one, two = (final_loss(images, rng.normal(2, 0.3, 240).tolist()) for _ in range(2))
        verdicts.append("within noise" in compare(one, two))
    assert 0.9 < np.mean(verdicts) < 1


def test_a_difference_beyond_noise_is_told():
    text = compare(FinalLoss(2.2, 0.03, 10), FinalLoss(2.0, 0.04, 10))
    assert text == "+0.2000, 4.0 standard errors: more than noise"
    assert "within noise" in compare(FinalLoss(2.0, 0.0, 10), FinalLoss(2.0, 0.0, 10))


def test_by_the_gain_rule_the_last_sixth_is_that_of_the_recipes_steps(tmp_path):
    # Half of the recipe's steps at a gain of 1, half at 2: two thirds of the images are of the
    # first half, so the last sixth of the images begins before that of the recipe's steps.
    lines = gain_lines(240)
    for line in lines:
        steps = line["steps"]
        line["iteration"] = (steps if steps <= 160 else 2 * steps - 160) - 1
        line["total_loss"] = 1.0 if line["iteration"] + 1 > 320 * 5 / 6 else 3.0
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _final_loss(read_history(tmp_path, 16))
    assert (found.mean, found.points) == (1.0, 14)
