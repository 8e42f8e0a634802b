"""Whole runs by the gain rule: their rates, their checkpoints, and how they go on elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.engine.trainer import Trainer
from d2scale.errors import CheckpointError
from d2scale.launch.topology import Topology
from meta_fcos.detector import OneStageDetector
from training_processes import RECIPE

# Added to a recipe of one image size, 4 images a step.
SETTINGS = (
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 12, "SOLVER.STEPS", "(8,)"),
    *("SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.25, "SOLVER.CHECKPOINT_PERIOD", 5),
    *("D2SCALE.LR_RULE", "gain"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 20, 2, image_size=(64, 96))


@pytest.fixture(autouse=True)
def _environment(shapes, monkeypatch, one_thread):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))


@pytest.fixture
def run(tmp_path, write_config):
    """Train the recipe with so many images a step, and return its folder."""
    path = write_config(RECIPE)

    def start(folder, images, *opts, method="max_memory", ranks=1, **options):
        folder = tmp_path / folder
        given = ("D2SCALE.IMS_PER_GPU", images // ranks, "OUTPUT_DIR", folder, *opts)
        train(
            load_cfg(path, [*map(str, (*SETTINGS, *given))]),
            Topology(ranks),
            method=method,
            **options,
        )
        return folder

    return start


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def content(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def assert_same_weights(found, expected, **tolerances):
    for name, value in content(expected)["model"].items():
        torch.testing.assert_close(content(found)["model"][name], value, **tolerances)


def recipe_rate(tau):
    """The rate that the recipe has after ``tau`` of its steps."""
    warmup = 0.25 + 0.75 * tau / 4 if tau < 4 else 1.0
    return 0.001 * warmup * (0.1 if tau >= 8 else 1.0)


@pytest.mark.parametrize("images", [6, 2], ids=["larger", "own"])
def test_rate_length_and_checkpoints_follow_the_recipes_count(run, images):
    folder = run("run", images)
    steps = steps_of(folder)
    before = 0.0
    for number, step in enumerate(steps, start=1):
        assert step["steps"] == number
        assert 1 <= step["gain"] <= images / 2
        assert step["recipe_steps"] == pytest.approx(before + step["gain"])
        assert step["lr"] == pytest.approx(step["gain"] * recipe_rate(before))
        assert step["images_seen"] == number * images
        before = step["recipe_steps"]
    assert steps[-2]["recipe_steps"] < 12 <= before
    assert steps[-1]["eta_seconds"] == 0
    # The first steps that reach 5 and 10 of the recipe's.
    saved = sorted(path.name for path in folder.glob("model_0*.pth"))
    reached = [min(s["iteration"] for s in steps if s["recipe_steps"] >= n) for n in (5, 10)]
    assert saved == [f"model_{iteration:07d}.pth" for iteration in reached]
    # Momentum forgets as much per step of the recipe as the recipe lets it.
    for group in content(folder)["optimizer"]["param_groups"]:
        assert group["momentum"] == pytest.approx(0.9 ** steps[-1]["gain"])
    written = load_cfg(str(folder / "config.yaml"))
    assert (written.SOLVER.MAX_ITER, written.SOLVER.STEPS) == (12, (8,))
    assert json.loads((folder / "plan.json").read_text())["lr_rule"] == "gain"


def test_the_recipes_own_batch_trains_the_recipes_weights(run):
    """In one part, and so cut in two to measure, and as the recipe is."""
    by_gain, plain = run("gain", 2), run("plain", 2, "D2SCALE.LR_RULE", "linear")
    assert_same_weights(by_gain, plain, rtol=1e-4, atol=1e-6)
    assert [step["gain"] for step in steps_of(by_gain)] == [1.0] * 12


def test_a_smaller_batch_takes_more_steps(run):
    folder = run("run", 6, "SOLVER.IMS_PER_BATCH", 12, "SOLVER.MAX_ITER", 9)
    assert all(0.5 <= step["gain"] <= 1 for step in steps_of(folder))
    assert 9 < len(steps_of(folder)) <= 18


def test_ranks_and_micro_batches_of_the_same_parts_train_alike(run):
    in_ranks = run("ranks", 6, ranks=2)
    in_parts = run("parts", 3, "D2SCALE.ACCUMULATION_STEPS", 2)
    gains = [[step["gain"] for step in steps_of(folder)] for folder in (in_ranks, in_parts)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-4)
    assert_same_weights(in_ranks, in_parts, rtol=1e-3, atol=1e-5)


@pytest.fixture
def stop_before(monkeypatch):
    """Have the next training interrupted before its step of a number, from 0."""

    def install(number):
        take_step = Trainer.take_step

        def interrupted(trainer):
            if trainer.clock.number == number:
                monkeypatch.setattr(Trainer, "take_step", take_step)
                raise KeyboardInterrupt
            return take_step(trainer)

        monkeypatch.setattr(Trainer, "take_step", interrupted)

    return install


def test_a_resumed_run_is_that_of_an_undisturbed_one(run, stop_before):
    whole = run("whole", 6)
    stop_before(5)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 6)
    stopped = run("stopped", 6, resume=True)
    assert_same_weights(stopped, whole, rtol=0, atol=0)
    keys = ("gain", "recipe_steps", "lr", "noise_scale", "iteration", "total_loss")
    found, expected = ([[s[k] for k in keys] for s in steps_of(f)] for f in (stopped, whole))
    assert found == expected
    assert content(stopped)["clock"] == content(whole)["clock"]


def test_another_batch_keeps_the_count_and_the_averages(run, stop_before, tmp_path):
    stop_before(5)
    with pytest.raises(KeyboardInterrupt):
        run("run", 6)
    (path,) = tmp_path.glob("run/model_0*.pth")
    saved = content(path.parent, path.name)["clock"]
    folder = run("run", 4, resume=True)
    first = next(step for step in steps_of(folder) if step["steps"] == saved["steps"] + 1)
    assert first["recipe_steps"] - first["gain"] == pytest.approx(saved["recipe_images"] / 2)
    assert first["gain"] <= 2
    # Nine tenths of its noise scale are what the larger batch has measured.
    noise = saved["noise"]
    before = noise["variance_sum"] / noise["signal_sum"]
    assert first["noise_scale"] == pytest.approx(before, rel=0.5)


def test_another_rule_is_refused_unless_allowed(run, stop_before):
    stop_before(5)
    with pytest.raises(KeyboardInterrupt):
        run("run", 6)
    linear = ("D2SCALE.LR_RULE", "linear")
    with pytest.raises(CheckpointError, match=r"D2SCALE\.LR_RULE is 'linear'") as caught:
        run("run", 6, *linear, resume=True)
    assert "\n" not in str(caught.value)
    saved = steps_of(run("run", 6, *linear, "D2SCALE.ALLOW_CHANGED_RECIPE", True, resume=True))
    # Steps of six images count for three of the recipe's two: the rest of 12 takes as many.
    by_gain = [step for step in saved if "gain" in step]
    left = -(-(12 - by_gain[-1]["recipe_steps"]) // 3)
    assert len(saved) - len(by_gain) == left


def test_the_rule_does_not_matter_at_the_recipes_own_batch(run, stop_before):
    stop_before(6)
    with pytest.raises(KeyboardInterrupt):
        run("run", 2, "D2SCALE.LR_RULE", "linear")
    steps = steps_of(run("run", 6, resume=True))
    assert steps[4]["images_seen"] == 10
    # The next steps count by their gain, from the five that are done.
    assert 6 <= steps[5]["recipe_steps"] <= 8
    assert steps[5]["images_seen"] == 16


def test_an_out_of_memory_step_counts_once(run, monkeypatch):
    forward, failed = OneStageDetector.forward, []

    def failing(self, samples, normalizers=None):
        losses = forward(self, samples, normalizers)
        if len(samples) == 3 and not failed:
            failed.append(samples)
            raise torch.OutOfMemoryError("out of memory")
        return losses

    monkeypatch.setattr(OneStageDetector, "forward", failing)
    steps = steps_of(run("run", 6))
    assert failed
    assert [step["steps"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[0]["recipe_steps"] == pytest.approx(steps[0]["gain"])
