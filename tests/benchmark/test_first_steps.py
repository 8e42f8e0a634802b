from __future__ import annotations

import json
from statistics import median

import pytest
import torch

from d2scale.benchmark import first_steps
from d2scale.benchmark.first_steps import FirstStepsOptions, measure_first_steps
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from d2scale.run_folder.comparison import compare
from d2scale.run_folder.measurements import read_measurements
from meta_fcos.detector import OneStageDetector
from training_processes import RECIPE

# Added to a recipe of 4 images a step.
SETTINGS = (
    *("MODEL.FPN.OUT_CHANNELS", 32, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96),
    *("SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "(30,)", "SOLVER.WARMUP_ITERS", 4),
    *("SOLVER.CHECKPOINT_PERIOD", 0),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 24, 2, image_size=(64, 96))


@pytest.fixture(autouse=True)
def _environment(shapes, monkeypatch, one_thread):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    monkeypatch.setattr(first_steps, "_TIMED_STEPS", 1)
    monkeypatch.setattr(first_steps, "_WARMUP_STEPS", 1)


@pytest.fixture
def recipe(tmp_path, write_config, monkeypatch):
    """Return a function that loads the recipe."""
    path = write_config(RECIPE)
    monkeypatch.chdir(tmp_path)
    return lambda *opts: load_cfg(path, [*map(str, (*SETTINGS, *opts))])


SPEEDS_ALONE = FirstStepsOptions(measures_noise=False)


def sizes_of(measured):
    return [(one.ims_per_batch, one.ims_per_gpu) for one in measured.candidates]


def test_batches_of_one_device_are_timed_the_recipes_first(recipe, tmp_path):
    before = set(tmp_path.rglob("*"))
    measured = measure_first_steps(recipe(), FirstStepsOptions(steps=10))
    assert sizes_of(measured) == [(4, 4), (8, 8), (16, 16), (2, 2)]
    assert all(one.images_per_second > 0 and one.world_size == 1 for one in measured.candidates)
    assert {one.setting for one in measured.candidates} == {"float32"}
    assert "no more than 16 images per GPU were tried (--max-ims-per-gpu)" in measured.notes
    assert [point.recipe_steps for point in measured.noise.points] == [*range(1, 11)]
    assert measured.machine["device"] == "cpu"
    assert set(tmp_path.rglob("*")) == before
    advice = compare([], measured).advice
    assert any("first 10 of 40 steps" in note for note in advice.notes)


def test_the_noise_is_that_of_a_training(recipe, tmp_path):
    short = ("SOLVER.MAX_ITER", 10, "SOLVER.STEPS", "(8,)")
    options = FirstStepsOptions(steps=10, max_ims_per_gpu=2)
    measured = measure_first_steps(recipe(*short), options).noise.points
    opts = ("D2SCALE.LR_RULE", "gain", "D2SCALE.IMS_PER_GPU", 2)
    train(recipe("OUTPUT_DIR", tmp_path / "run", *short, *opts))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    trained = [line["noise_scale"] for line in lines[:10]]
    assert [point.noise_scale for point in measured] == pytest.approx(
        [float("inf") if scale is None else scale for scale in trained]
    )


def test_a_run_takes_the_steps_that_it_took(recipe, tmp_path):
    opts = ("SOLVER.MAX_ITER", 10, "SOLVER.STEPS", "(8,)", "D2SCALE.IMS_PER_GPU", 8)
    train(recipe("OUTPUT_DIR", tmp_path / "run", *opts), method="max_memory")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    comparison = compare([read_measurements(tmp_path / "run")])
    row = comparison.advice.best
    assert row.candidate.ims_per_batch == 8
    assert row.steps == lines[-1]["steps"] < 10
    expected = row.steps * median(line["time"] for line in lines)
    assert row.seconds == pytest.approx(expected, rel=0.2)  # the last step is worth too much
    assert comparison.machine.endswith(" cores")


def test_a_recipe_that_does_not_fit_has_the_speed_of_its_micro_batch(recipe):
    measured = measure_first_steps(recipe(), FirstStepsOptions(max_ims_per_gpu=3, steps=10))
    of_two, of_three, of_recipe = sorted(
        measured.candidates, key=lambda one: (one.ims_per_batch, one.ims_per_gpu)
    )
    assert (of_three.ims_per_gpu, of_recipe.ims_per_batch, of_recipe.ims_per_gpu) == (3, 4, 2)
    assert of_recipe.images_per_second == of_two.images_per_second
    assert any("have the speed of their micro-batch" in note for note in measured.notes)


def test_what_does_not_fit_is_left_out(recipe, monkeypatch):
    forward = OneStageDetector.forward

    def limited(model, batch, *args, **kwargs):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, batch, *args, **kwargs)

    monkeypatch.setattr(OneStageDetector, "forward", limited)
    measured = measure_first_steps(recipe(), SPEEDS_ALONE)
    assert sizes_of(measured) == [(4, 4), (2, 2)]
    assert measured.notes[0].startswith("not measured: 8, 16 images per GPU in float32")


def test_the_most_that_fit_by_the_memory_are_called_so(recipe, monkeypatch):
    monkeypatch.setattr(first_steps, "largest_ims_per_gpu", lambda cfg: 6)
    measured = measure_first_steps(recipe(), SPEEDS_ALONE)
    assert sizes_of(measured) == [(4, 4), (6, 6), (2, 2)]
    assert [one.fills_memory for one in measured.candidates] == [False, True, False]
    assert measured.notes == ()


def test_when_the_time_is_over_the_rest_is_not_measured(recipe):
    measured = measure_first_steps(recipe(), FirstStepsOptions(steps=40, minutes=1e-6))
    assert sizes_of(measured) == [(4, 4)]
    assert len(measured.noise.points) == 10
    assert measured.notes[0].startswith("not measured: 2, 8, 16 images per GPU in float32")


def test_variants_are_timed_beside_each_other(recipe):
    options = FirstStepsOptions(measures_noise=False, variants=True, max_ims_per_gpu=2)
    measured = measure_first_steps(recipe("SOLVER.IMS_PER_BATCH", 2), options)
    assert [one.setting for one in measured.candidates] == [
        "float32",
        "float32, activation checkpointing",
        "AMP",
        "AMP, activation checkpointing",
    ]


@pytest.mark.parametrize(
    ("opts", "options", "key"),
    [
        (("SOLVER.IMS_PER_BATCH", 1), {}, "SOLVER.IMS_PER_BATCH"),
        (("SOLVER.OPTIMIZER", "adamw"), {}, "SOLVER.OPTIMIZER"),
        (("SOLVER.MAX_ITER", 0), {}, "SOLVER.MAX_ITER"),
        (("MODEL.WEIGHTS", "nowhere.pth"), {}, "MODEL.WEIGHTS"),
        (("SOLVER.GAMMA", -1), {}, "SOLVER.GAMMA"),
        (("DATASETS.TRAIN", "('nothing',)"), {}, "DATASETS.TRAIN"),
        ((), {"steps": 9}, "--steps"),
        ((), {"minutes": 0.0}, "--minutes"),
        ((), {"minutes": float("nan")}, "--minutes"),
        ((), {"max_ims_per_gpu": -1}, "--max-ims-per-gpu"),
    ],
)
def test_mistakes_are_one_line(recipe, opts, options, key):
    with pytest.raises(ConfigError) as caught:
        measure_first_steps(recipe(*opts), FirstStepsOptions(**options))
    (fault,) = caught.value.faults
    assert fault.key == key
