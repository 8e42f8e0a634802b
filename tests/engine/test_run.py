"""Whole runs of a tiny MetaFCOS on drawn shapes."""

from __future__ import annotations

import json

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.engine.trainer import Trainer
from d2scale.errors import ConfigError, D2ScaleError
from d2scale.launch.launch import Topology

RECIPE = """
_BASE_: d2scale://MetaFCOS/Base-MetaFCOS.yaml
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, NORM: GN}
  BACKBONE: {FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
D2SCALE: {EXACT: true}
SOLVER:
  REFERENCE_WORLD_SIZE: 1
  IMS_PER_BATCH: 5
  BASE_LR: 0.001
  MAX_ITER: 6
  STEPS: []
  WARMUP_ITERS: 0
  CHECKPOINT_PERIOD: 2
WRITER_PERIOD: 1
SEED: 7
"""
pytestmark = pytest.mark.usefixtures("one_thread")
ALLOWED = ("D2SCALE.ALLOW_CHANGED_RECIPE", True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 12, 4, image_size=(64, 96))


@pytest.fixture
def recipe(tmp_path, shapes, monkeypatch):
    """Return a function that loads the recipe into a folder of the test."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def load(folder, *opts):
        return load_cfg(str(path), ["OUTPUT_DIR", str(tmp_path / folder), *map(str, opts)])

    return load


def weights(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def losses(folder):
    return {line["iteration"]: line["total_loss"] for line in lines(folder) if "lr" in line}


def train_until(monkeypatch, cfg, iteration):
    """Train as if interrupted before a step."""
    take_step = Trainer.take_step

    def interrupted(trainer):
        if trainer.next_iteration == iteration:
            raise KeyboardInterrupt
        return take_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cfg)


def test_folder_of_a_run(recipe, tmp_path):
    cfg = recipe("run", "TEST.EVAL_PERIOD", 4, "D2SCALE.IMS_PER_GPU", 2)
    results = train(cfg)
    folder = tmp_path / "run"
    assert {path.name.split(".")[0] for path in folder.glob("[!.]*")} == {
        "config",
        "events",
        "inference",
        "last_checkpoint",
        "log",
        "machine",
        "metrics",
        "model_0000001",
        "model_0000003",
        "model_0000005",
        "model_final",
        "plan",
    }
    assert set(results) > {"bbox/AP", "bbox/AP50", "bbox/ARdet100", "bbox/AP-kite"}
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["method"], plan["ims_per_gpu"], plan["accumulation_steps"]) == ("keep_total", 2, 3)
    written = load_cfg(str(folder / "config.yaml"))
    assert (written.SEED, written.D2SCALE.IMS_PER_GPU) == (7, 2)
    told = lines(folder)
    steps = [line for line in told if "lr" in line]
    assert [line["iteration"] for line in steps] == list(range(6))
    assert set(steps[0]) == {
        "iteration",
        "total_loss",
        "loss_fcos_cls",
        "loss_fcos_loc",
        "loss_fcos_ctr",
        "noise_scale",  # from the two ranks or micro-batches
        "steps",
        "lr",
        "time",
        "data_time",
        "eta_seconds",
        "images_seen",
        "elapsed_seconds",
    }
    machine = json.loads((folder / "machine.json").read_text())
    assert (machine["device"], machine["processes"]) == ("cpu", 1)
    assert "device_memory_mb" not in machine
    assert [line["iteration"] for line in told if "bbox/AP" in line] == [3, 5]
    assert (folder / "inference" / "coco_instances_results.json").exists()


def test_resumed_run_is_the_undisturbed_one(recipe, tmp_path, monkeypatch):
    train(recipe("whole", "DATASETS.TEST", "()"))
    train_until(monkeypatch, recipe("parts", "DATASETS.TEST", "()"), 3)
    # From the checkpoint of iteration 1: iteration 2 was done, and is done again.
    train(recipe("parts", "DATASETS.TEST", "()"), resume=True)
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    found = weights(parts)
    for name, value in weights(whole).items():
        assert torch.equal(found[name], value), name
    assert losses(parts) == losses(whole)
    assert "first iteration 2" in (parts / "log.txt").read_text()


def test_two_processes_train_what_one_does(recipe, tmp_path):
    # Five images are 3 and 2, in micro-batches of 2, 1 and 2.
    one = train(recipe("one"))
    two = train(recipe("two", "D2SCALE.IMS_PER_GPU", 2), Topology(2))
    assert set(two) == set(one)
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3)
    assert (tmp_path / "two" / "log.txt.rank1").exists()
    # What two began, one goes on with.
    train(recipe("two", "SOLVER.MAX_ITER", 7, *ALLOWED), resume=True)
    assert list(losses(tmp_path / "two")) == list(range(7))


def test_loss_that_is_not_finite_ends_all_ranks_with_one_line(recipe, tmp_path):
    cfg = recipe("run", "SOLVER.BASE_LR", 1e15, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(D2ScaleError, match="not finite") as caught:
        train(cfg, Topology(2))
    assert "\n" not in str(caught.value)
    (path,) = (tmp_path / "run").glob("not_finite_*.json")
    told = json.loads(path.read_text())
    assert f"at iteration {told['iteration']} " in str(caught.value)
    assert told["lr"] == 1e15
    assert {"nan", "inf"} & {str(value) for value in told["losses"].values()}
    assert [image["rank"] for image in told["images"]] == [0, 0, 0, 1, 1]
    assert len({image["image_id"] for image in told["images"]}) == 5
    for value in torch.load(tmp_path / "run" / "model_0000000.pth", weights_only=True)[
        "model"
    ].values():
        assert torch.isfinite(value).all()


def test_evaluation_alone_repeats_the_last_one(recipe, tmp_path):
    trained = train(recipe("run", "SOLVER.MAX_ITER", 2, "MODEL.FCOS.PRIOR_PROB", 0.2))
    final = tmp_path / "run" / "model_final.pth"
    again = train(recipe("eval", "MODEL.WEIGHTS", final), eval_only=True)
    assert again == pytest.approx(trained, nan_ok=True)
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"inference", "log.txt"}
    assert train(recipe("run"), eval_only=True, resume=True) == pytest.approx(trained, nan_ok=True)
    # As after a kill between a checkpoint and its name.
    (tmp_path / "run" / "last_checkpoint").unlink()
    assert train(recipe("run"), eval_only=True, resume=True) == pytest.approx(trained, nan_ok=True)


def test_falls_back_to_what_the_machine_has(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # In bfloat16 a convolution over a single pixel, p7's here, has no reliable gradient on CPUs.
    sizes = ("INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", 192)
    opts = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 1)
    train(recipe("run", *opts, *sizes, "DATASETS.TEST", "()"))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "CUDA is not available: running on the CPU" in text
    assert "needs CUDA: using bfloat16" in text


def test_seed_by_chance_is_told_and_kept(recipe, tmp_path, monkeypatch):
    train_until(monkeypatch, recipe("run", "SEED", -1, "DATASETS.TEST", "()"), 2)
    train(
        recipe("run", "SEED", -1, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3, *ALLOWED),
        resume=True,
    )
    told = [
        line.split("seed ")[1].split(",")[0]
        for line in (tmp_path / "run" / "log.txt").read_text().splitlines()
        if "seed " in line
    ]
    assert len(told) == 2
    assert told[0] == told[1]


def faults_of(cfg, **options):
    with pytest.raises(ConfigError) as caught:
        train(cfg, **options)
    return {fault.key: fault for fault in caught.value.faults}


def test_all_faults_are_told_at_once_and_nothing_is_written(recipe, tmp_path):
    cfg = recipe(
        "run",
        *("MODEL_EMA.ENABLED", True),
        *("INPUT.RANDOM_FLIP", "diagonal"),
        *("MODEL.FCOS.LOC_LOSS_TYPE", "huber"),
        *("MODEL.WEIGHTS", "missing.pth"),
        *("DATASETS.TEST", "('coco_of_my_own',)"),
        *("SOLVER.IMS_PER_BATCH", 0),
    )
    assert set(faults_of(cfg)) == {
        "MODEL_EMA.ENABLED",
        "INPUT.RANDOM_FLIP",
        "MODEL.FCOS.LOC_LOSS_TYPE",
        "MODEL.WEIGHTS",
        "DATASETS.TEST",
        "SOLVER.IMS_PER_BATCH",
    }
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eval_only", [False, True])
def test_unreadable_weights_leave_no_folder(recipe, tmp_path, eval_only):
    weights = tmp_path / "weights.pth"
    weights.write_text("no weights")
    (key,) = faults_of(recipe("run", "MODEL.WEIGHTS", weights), eval_only=eval_only)
    assert str(weights) in key
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("opts", "options", "key"),
    [
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), {}, "MODEL.META_ARCHITECTURE"),
        ((), {"topology": Topology(6)}, "SOLVER.IMS_PER_BATCH"),
        ((), {"topology": Topology(0)}, "--num-gpus"),
        ((), {"topology": Topology(num_machines=2)}, "--dist-url"),
        ((), {"method": "largest"}, "method"),
        ((), {"method": "max_memory"}, "D2SCALE.IMS_PER_GPU"),
        ((), {"eval_only": True}, "MODEL.WEIGHTS"),
        (("DATASETS.TRAIN", "()"), {}, "DATASETS.TRAIN"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, opts, options, key):
    assert set(faults_of(recipe("run", *opts), **options)) == {key}
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fault = faults_of(recipe("run", "MODEL.DEVICE", "cuda"), topology=Topology(2))["--num-gpus"]
    assert fault.allowed == "at most 1, the GPUs of this machine"


def test_folder_that_cannot_be_written(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert set(faults_of(recipe("file"))) == {"OUTPUT_DIR"}
    assert set(faults_of(recipe("file/run"))) == {"OUTPUT_DIR"}


def test_another_run_is_not_overwritten(recipe, tmp_path):
    train(recipe("run", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    fault = faults_of(recipe("run"))["OUTPUT_DIR"]
    assert "--resume" in fault.advice
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_resume_without_a_checkpoint_starts_anew(recipe, tmp_path):
    train(recipe("run", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"), resume=True)
    assert "starting anew" in (tmp_path / "run" / "log.txt").read_text()
