"""Runs that go on: on other hardware, after a kill, and not with another recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import training_processes
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import TrainLoader
from d2scale.engine.run import train
from d2scale.engine.trainer import Trainer
from d2scale.errors import CheckpointError, ConfigError
from d2scale.planning.progress import RECORD
from d2scale.run_folder.lock import run_lock
from training_processes import RECIPE
from warm_processes import run_python

LINEAR = ("D2SCALE.LR_RULE", "linear")
ALLOWED = ("D2SCALE.ALLOW_CHANGED_RECIPE", True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 20, 2, image_size=(64, 96))


@pytest.fixture(autouse=True)
def _environment(shapes, monkeypatch, one_thread):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)

    def load(folder, *opts):
        return load_cfg(str(path), ["OUTPUT_DIR", str(tmp_path / folder), *map(str, opts)])

    return load


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory, one_thread):
    """The folder of a whole run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes))
        train(load_cfg(str(folder / "recipe.yaml"), ["OUTPUT_DIR", str(folder / "run")]))
    return folder / "run"


def train_until(monkeypatch, cfg, iteration, **options):
    """Train as if interrupted before a step."""
    take_step = Trainer.take_step

    def interrupted(trainer):
        if trainer.next_iteration == iteration:
            raise KeyboardInterrupt
        return take_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cfg, **options)


@pytest.fixture
def shown(monkeypatch):
    """The images of every step that this process has taken, by id."""
    steps = []
    following = TrainLoader.__next__

    def remembering(loader):
        samples = following(loader)
        steps.append([sample["image_id"] for sample in samples])
        return samples

    monkeypatch.setattr(TrainLoader, "__next__", remembering)
    return steps


def content(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def steps_told(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line for line in lines if "lr" in line}


def log(folder):
    return (folder / "log.txt").read_text()


def assert_same_weights(found, expected, tolerance=0.0):
    """Compare the norm of all differences with that of all weights."""
    pairs = [
        (content(found)["model"][name].double(), value.double())
        for name, value in content(expected)["model"].items()
    ]
    difference = torch.stack([(one - other).norm() for one, other in pairs]).norm()
    assert float(difference) <= tolerance * float(torch.stack([w.norm() for _, w in pairs]).norm())


def test_goes_on_with_another_number_of_images_per_gpu(recipe, tmp_path, monkeypatch, undisturbed):
    train_until(monkeypatch, recipe("run", "D2SCALE.IMS_PER_GPU", 3), 5)
    train(recipe("run", "D2SCALE.IMS_PER_GPU", 1), resume=True)
    run = tmp_path / "run"
    assert_same_weights(run, undisturbed, 1e-4)
    assert list(steps_told(run)) == list(range(8))
    text = log(run)
    assert re.search(r"\| images per GPU +\| 2 +\| 1 +\|", text)
    assert "16 images seen in 4 iterations: going on with iteration 4 of 8" in text
    assert json.loads((run / "plan.json").read_text())["ims_per_gpu"] == 1


def test_is_exact_in_float64(recipe, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        train(recipe("whole"))
        train_until(monkeypatch, recipe("run", "D2SCALE.IMS_PER_GPU", 3), 5)
        train(recipe("run", "D2SCALE.IMS_PER_GPU", 1), resume=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert content(tmp_path / "run")["model"]["backbone.fpn_output3.weight"].dtype == torch.float64
    assert_same_weights(tmp_path / "run", tmp_path / "whole", 1e-8)


def test_goes_on_with_another_total_batch_at_the_same_image(
    recipe, tmp_path, monkeypatch, shown, undisturbed
):
    expected = content(undisturbed)
    train_until(monkeypatch, recipe("run"), 4)
    cfg = recipe("run", "D2SCALE.IMS_PER_GPU", 3, *LINEAR)
    train(cfg, resume=True, method="max_memory")
    run = tmp_path / "run"
    # 16 of 32 images are seen: 6 steps of 3 are left of 11, which show 18.
    steps = steps_told(run)
    assert list(steps) == [0, 1, 2, 3, *range(5, 11)]
    assert [line["images_seen"] for line in steps.values()] == [
        *(4, 8, 12, 16),
        *(19, 22, 25, 28, 31, 34),
    ]
    # The rate drops at 24 images, and is three quarters of the recipe's.
    rates = [line["lr"] for line in steps.values()]
    assert rates[4:] == pytest.approx([0.00075] * 3 + [0.000075] * 3)
    found = content(run)
    assert (found["iteration"], found["images_seen"]) == (10, 34)
    state, other = found["optimizer"]["state"], expected["optimizer"]["state"]
    assert state.keys() == other.keys()
    # 18 images have boxes: each is shown once before any is shown again.
    images = [image for step in shown for image in step]
    size = found["sampler"]["size"]
    waiting = found["sampler"]["waiting"]
    epochs, position = found["sampler"]["epoch"], found["sampler"]["position"]
    assert len(images) + len(waiting) == epochs * size + position
    assert len(set(images[: size - 4])) == size - 4
    assert "| total batch" in log(run)
    assert "from 4 to 3; the optimizer's state is kept" in log(run)


def test_a_changed_recipe_is_refused_and_nothing_is_overwritten(recipe, tmp_path, monkeypatch):
    train_until(monkeypatch, recipe("run"), 3)
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.glob("[!.]*") if path.name != "log.txt"}
    changed = recipe("run", "SOLVER.BASE_LR", 0.002, "SOLVER.GAMMA", 0.5)
    with pytest.raises(CheckpointError) as caught:
        train(changed, resume=True)
    assert {fault.key for fault in caught.value.faults} == {"SOLVER.BASE_LR", "SOLVER.GAMMA"}
    assert len(str(caught.value).splitlines()) == 2
    assert {
        path: path.read_bytes() for path in run.glob("[!.]*") if path.name != "log.txt"
    } == before
    train(recipe("run", "SOLVER.BASE_LR", 0.002, "SOLVER.GAMMA", 0.5, *ALLOWED), resume=True)
    assert steps_told(run)[3]["lr"] == pytest.approx(0.002)
    assert "the recipe has changed, as allowed" in log(run)


def test_another_dataset_if_allowed_begins_a_new_order(recipe, tmp_path, monkeypatch):
    train_until(monkeypatch, recipe("run"), 3)
    other = ("DATASETS.TRAIN", "('coco_pretrain_val_base',)", "SOLVER.MAX_ITER", 3)
    with pytest.raises(CheckpointError, match="DATASETS"):
        train(recipe("run", *other, "SOLVER.STEPS", "()"), resume=True)
    train(recipe("run", *other, "SOLVER.STEPS", "()", *ALLOWED), resume=True)
    assert "the order of images begins anew" in log(tmp_path / "run")


def test_resumes_with_the_config_that_the_run_has_left(recipe, tmp_path, monkeypatch):
    cfg = recipe("run", "D2SCALE.IMS_PER_GPU", 2, *LINEAR)
    train_until(monkeypatch, cfg, 3, method="max_memory")
    train(load_cfg(str(tmp_path / "run" / "config.yaml")), resume=True)
    assert len(steps_told(tmp_path / "run")) == 16


def test_optimizer_state_of_another_memory_layout(recipe, tmp_path, monkeypatch, undisturbed):
    """A GPU's weights and momentum are contiguous, where a CPU's have channels last."""
    train_until(monkeypatch, recipe("run"), 5)
    path = tmp_path / "run" / "model_0000003.pth"
    saved = torch.load(path, weights_only=True)
    changed = 0
    for state in saved["optimizer"]["state"].values():
        momentum = state["momentum_buffer"]
        if momentum.dim() == 4:
            contiguous = momentum.is_contiguous()
            layout = torch.channels_last if contiguous else torch.contiguous_format
            state["momentum_buffer"] = momentum.contiguous(memory_format=layout)
            changed += state["momentum_buffer"].stride() != momentum.stride()
    assert changed > 10
    torch.save(saved, path)
    train(recipe("run"), resume=True)
    assert_same_weights(tmp_path / "run", undisturbed)


def test_checkpoint_without_a_record_resumes_at_the_recipes_own_batch(
    recipe, tmp_path, monkeypatch
):
    train_until(monkeypatch, recipe("run"), 5)
    run = tmp_path / "run"
    path = run / "model_0000003.pth"
    old = torch.load(path, weights_only=True)
    kept = {key: old[key] for key in ("model", "optimizer", "iteration")}
    torch.save({**kept, "scheduler": {"last_epoch": 4}}, path)
    cfg = recipe("run", "D2SCALE.IMS_PER_GPU", 2, *LINEAR)
    train(cfg, resume=True, method="max_memory")
    text = log(run)
    assert "assuming this recipe, run at its own total batch, so 4 iterations of 4 images" in text
    assert "the order of images begins anew" in text
    assert "going on with iteration 8 of 16" in text
    found = content(run)
    assert found["images_seen"] == 32
    assert found["optimizer"]["state"]


def test_newer_format_and_other_model(recipe, tmp_path, monkeypatch):
    train_until(monkeypatch, recipe("run"), 3)
    path = tmp_path / "run" / "model_0000001.pth"
    old = torch.load(path, weights_only=True)
    torch.save({**old, RECORD: {**old[RECORD], "format": 99}}, path)
    with pytest.raises(CheckpointError, match="update d2scale"):
        train(recipe("run"), resume=True)
    torch.save(old, path)
    wider = recipe("run", "MODEL.FPN.OUT_CHANNELS", 96, *ALLOWED)
    with pytest.raises(CheckpointError, match="shapes that differ") as caught:
        train(wider, resume=True)
    assert "\n" not in str(caught.value)


HOLDER = """
import sys, time
from pathlib import Path
from d2scale.run_folder.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_that_another_run_writes_to(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on ") as caught:
            train(recipe("run"), resume=True)
        assert "\n" not in str(caught.value)
        assert {path.name for path in folder.iterdir()} == {".lock"}
        with pytest.raises(ConfigError, match="no other run"), run_lock(folder):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(folder):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.fixture
def start(tmp_path):
    """Run a training in processes of its own and return its end."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(*arguments, launcher=(), **environment):
        words = [
            *(*launcher, training_processes.__file__, "train"),
            *("--config-file", str(tmp_path / "recipe.yaml"), *arguments),
            *("OUTPUT_DIR", str(tmp_path / "run")),
        ]
        return run_python(words, **environment)

    return run


@pytest.mark.parametrize("name", ["model_0000001", "model_0000003", "last_checkpoint"])
def test_killed_while_writing(start, tmp_path, undisturbed, recipe, name):
    run = tmp_path / "run"
    if name == "last_checkpoint":
        shutil.copytree(undisturbed, run)
        # As a kill between the two files leaves it.
        (run / name).write_text("model_0000003.pth")
    else:
        killed = start(KILL_WHILE_WRITING=name)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (partial,) = run.glob(f".{name}.pth.*.partial")
        assert partial.stat().st_size > 1000
    train(recipe("run"), resume=True)
    assert not list(run.glob("*.partial"))
    assert_same_weights(run, undisturbed)
    assert list(steps_told(run)) == list(range(8))


@pytest.mark.parametrize("kept_bytes", [None, 5000])
def test_a_kill_before_the_end_of_the_last_checkpoint(recipe, tmp_path, undisturbed, kept_bytes):
    shutil.copytree(undisturbed, tmp_path / "run")
    final = tmp_path / "run" / "model_final.pth"
    if kept_bytes is None:
        final.unlink()
        (tmp_path / "run" / "last_checkpoint").write_text("model_0000007.pth")
    else:
        os.truncate(final, kept_bytes)
    train(recipe("run"), resume=True)
    assert_same_weights(tmp_path / "run", undisturbed)
    for name in ("iteration", "images_seen", "sampler", "clock"):
        assert content(tmp_path / "run")[name] == content(undisturbed)[name]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


def test_torchrun_brings_a_killed_rank_back(start, tmp_path, undisturbed):
    launcher = (
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"),
    )
    done = start(launcher=launcher, KILL_RANK="1", KILL_BEFORE="5")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert "going on with iteration 4 of 8" in log(run)
    assert_same_weights(run, undisturbed, 1e-4)
    assert list(steps_told(run)) == list(range(8))


def test_two_ranks_then_one(start, tmp_path, recipe, undisturbed):
    stopped = start("--num-gpus", "2", KILL_RANK="1", KILL_BEFORE="5")
    assert stopped.returncode != 0
    train(recipe("run"), resume=True)
    assert_same_weights(tmp_path / "run", undisturbed, 1e-4)
    assert re.search(r"\| GPUs +\| 2 +\| 1 +\|", log(tmp_path / "run"))


def test_one_rank_then_three(start, tmp_path, recipe, monkeypatch, undisturbed):
    train_until(monkeypatch, recipe("run"), 5)
    done = start("--num-gpus", "3", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "run", undisturbed, 1e-4)


def test_the_command_line_refuses_with_status_2(start, tmp_path, recipe, monkeypatch):
    train_until(monkeypatch, recipe("run"), 3)
    started = time.time()
    done = start("--resume", "SOLVER.BASE_LR", "0.003")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "d2scale: error" in line]
    assert "SOLVER.BASE_LR is 0.003; allowed: 0.001" in line
    changed = [p.name for p in (tmp_path / "run").iterdir() if p.stat().st_mtime > started]
    assert set(changed) <= {"log.txt", ".lock"}
