"""``d2scale train`` on recipes of plain detectron2: any number of processes, killed and resumed."""

import json
import os
import shutil

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from detectron2_commands import (
    LAZY,
    RETINANET,
    SCRIPT,
    TORCHRUN,
    Trainings,
    difference,
    errors,
)

pytestmark = pytest.mark.timeout(900)

# Of float32, where gradients are added in another order.
ROUNDING = 1e-6


def normalizers(checkpoint):
    """Return the moving loss normalizer of each virtual rank."""
    states = checkpoint["d2scale_steps"]["virtual_ranks"]["states"]
    return [state["attributes"][""]["loss_normalizer"] for state in states]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_shapes_dataset(
        tmp_path_factory.mktemp("datasets"), train_images=12, val_images=2, seed=0
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory, datasets):
    return Trainings(tmp_path_factory.mktemp("retinanet"), datasets)


@pytest.fixture(scope="module")
def whole(train):
    """A training on one process; the checkpoint of its end."""
    train("whole")
    return train.checkpoint("whole")


def test_one_process_runs_the_recipes_ranks(train, whole):
    folder = train.folder / "whole"
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["virtual_ranks"], plan["ims_per_gpu"], plan["ims_per_batch"]) == (4, 1, 4)
    assert (folder / "model_0000003.pth").exists()
    assert "bbox/AP" in (folder / "metrics.json").read_text()
    assert len({*normalizers(whole)}) == 4
    assert whole["d2scale_steps"]["place"]["steps"] == [[6, 4, 1]]
    log = (folder / "log.txt").read_text()
    assert log.count("Scaled the config") == log.count("Environment") == 1


def test_the_config_in_the_folder_is_one_of_plain_detectron2(train, whole):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(train.folder / "whole" / "config.yaml"))
    assert (cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH) == (1, 4)


@pytest.mark.parametrize("processes", [2, 3])
def test_more_processes_train_the_same(train, whole, processes):
    train(f"on{processes}", processes=processes)
    assert difference(train.checkpoint(f"on{processes}"), whole) < ROUNDING


def test_an_ordered_sum_gives_the_same_bits_on_any_number_of_processes(train):
    short = ("D2SCALE.ORDERED_SUM", "True", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()")
    for processes in (1, 3):
        train(f"ordered{processes}", *short, processes=processes)
    one, three = (train.checkpoint(f"ordered{number}")["model"] for number in (1, 3))
    assert all(torch.equal(value, three[name]) for name, value in one.items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_killed_and_resumed_on_another_number_of_processes(train, whole, before, after):
    out = f"killed{before}"
    train(out, program=[SCRIPT], processes=before, status=-9, KILL_AFTER=3)
    assert (train.folder / out / "last_checkpoint").read_text() == "model_0000001.pth"
    output = train(out, "--resume", processes=after)
    assert "8 images seen in 2 iterations: going on with iteration 2 of 6" in output
    assert difference(train.checkpoint(out), whole) < ROUNDING


@pytest.mark.parametrize("named", ["model_0000005.pth", "model_final.pth", ""])
def test_a_kill_before_the_end_of_the_last_checkpoint(train, whole, named):
    """With ``named`` in last_checkpoint; detectron2 writes both files in place."""
    folder = train.folder / f"cut-{named}"
    shutil.copytree(train.folder / "whole", folder)
    os.truncate(folder / "model_final.pth", 5000)
    (folder / "last_checkpoint").write_text(named)
    train(folder.name, "--resume")
    final = train.checkpoint(folder.name)
    assert difference(final, whole) == 0
    assert normalizers(final) == normalizers(whole)
    assert (final["iteration"], final["trainer"]["iteration"]) == (5, 5)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_a_users_script_under_torchrun(train, whole):
    train("torchrun", program=[*TORCHRUN, SCRIPT])
    assert difference(train.checkpoint("torchrun"), whole) < ROUNDING


def test_what_has_no_effect_is_told(train):
    ignored = {"D2SCALE.EXACT": "True", "D2SCALE.ACTIVATION_CHECKPOINTING": "True"}
    ignored |= {"TEST.AUG.ENABLED": "True", "D2SCALE.TILES.SIZE": "64"}
    short = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
    train("ignored", *short, *(word for pair in ignored.items() for word in pair))
    log = (train.folder / "ignored" / "log.txt").read_text()
    assert [log.count(f"{key} has no effect under") for key in ignored] == [1, 1, 1, 1]


def test_larger_steps_follow_the_gain_rule(train):
    settings = ("D2SCALE.IMS_PER_GPU", "8", "SOLVER.MAX_ITER", "8", "DATASETS.TEST", "()")
    train("gain", "--method=max_memory", *settings)
    plan = json.loads((train.folder / "gain" / "plan.json").read_text())
    assert (plan["lr_rule"], plan["ims_per_batch"], plan["virtual_ranks"]) == ("gain", 8, 0)
    last = json.loads((train.folder / "gain" / "metrics.json").read_text().splitlines()[-1])
    assert last["recipe_steps"] >= 8 > last["steps"] > 4
    assert last["images_seen"] == 8 * last["steps"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, datasets):
    """Trainings with two images for each virtual rank."""
    recipe = RETINANET.replace("SIZE: 4", "SIZE: 2")
    return Trainings(tmp_path_factory.mktemp("pairs"), datasets, recipe)


def test_an_error_of_memory_on_one_rank_changes_nothing(pairs):
    pairs("whole")
    # Rank 1 has no room for 2 images from its third forward on.
    fails = {"FAIL_RANK": 1, "FAIL_FROM": 2, "FAIL_IMAGES": 2}
    output = pairs("split", program=[SCRIPT], processes=2, **fails)
    assert "Out of memory in forward or backward on rank 1" in output
    plan = json.loads((pairs.folder / "split" / "plan.json").read_text())
    assert plan["ims_per_gpu"] == 1
    # But for batch norm, which takes its statistics from the images of a forward.
    found, expected = normalizers(pairs.checkpoint("split")), normalizers(pairs.checkpoint("whole"))
    assert found == pytest.approx(expected)


def test_images_that_never_fit_leave_the_last_good_step(pairs):
    fails = {"FAIL_RANK": 0, "FAIL_FROM": 6, "FAIL_IMAGES": 1}
    output = pairs("never", program=[SCRIPT], status=2, **fails)
    assert "d2scale: error: out of memory" in output
    assert "Traceback" not in output
    last = (pairs.folder / "never" / "last_checkpoint").read_text()
    assert last == "model_0000002.pth"
    # The place is that after the last good step.
    assert pairs.checkpoint("never", last)["d2scale_steps"]["place"]["steps"] == [[3, 2, 2]]


def test_a_lazy_config_trains_and_resumes_on_another_number_of_processes(
    tmp_path_factory, datasets
):
    train = Trainings(tmp_path_factory.mktemp("lazy"), datasets, LAZY)
    train("whole", processes=2)
    whole, folder = train.checkpoint("whole"), train.folder
    shutil.copytree(folder / "whole", folder / "halfway")
    for name in ("model_0000003.pth", "model_0000005.pth", "model_final.pth"):
        (folder / "halfway" / name).unlink()
    (folder / "halfway" / "last_checkpoint").write_text("model_0000001.pth")
    output = train("halfway", "--resume")
    assert "engine detectron2: the recipe is a LazyConfig" in output
    assert "going on with iteration 2 of 6" in output
    assert difference(train.checkpoint("halfway"), whole) < ROUNDING
    for out in ("whole", "halfway"):
        assert (folder / out / "plan.json").exists()
    from detectron2.config import LazyConfig

    cfg = LazyConfig.load(str(folder / "halfway" / "config.yaml"))
    assert (cfg.dataloader.train.total_batch_size, cfg.train.max_iter) == (4, 6)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (("NORM: BN", "NORM: SyncBN"), ["D2SCALE.IMS_PER_GPU", "1"], "synchronised batch norm"),
        (("coco_2017_train", "no_such"), [], "DATASETS.TRAIN is 'no_such'"),
        (("NUM_CONVS: 1", "NUM_CONS: 1"), [], "did you mean MODEL.RETINANET.NUM_CONVS"),
        (("TEST: {", "D2SCALE: {ON_OOM: sometimes}\nTEST: {"), [], "ON_OOM is 'sometimes'"),
        (("IMS_PER_BATCH: 4", "IMS_PER_BATCH: 2"), [], "SOLVER.IMS_PER_BATCH is 2"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, datasets, change, words, message):
    train = Trainings(tmp_path, datasets, RETINANET.replace(*change))
    output = train("out", "D2SCALE.IMS_PER_GPU", "0", *words, status=2)
    (line,) = errors(output)
    assert message in line
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_lazy_configs_that_cannot_be_trained_are_one_line(tmp_path, datasets):
    for text, message in (
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("del dataloader.train.total_batch_size", "dataloader.train.total_batch_size"),
    ):
        train = Trainings(tmp_path, datasets, f"{LAZY}\n{text}\n")
        (line,) = errors(train("out", status=2))
        assert message in line
        assert not (tmp_path / "out").exists()


def test_another_recipe_is_refused_and_leaves_the_checkpoints(train, whole):
    shutil.copytree(train.folder / "whole", train.folder / "other")
    before = {path.name for path in (train.folder / "other").glob("*.pth")}
    output = train("other", "--resume", "SOLVER.BASE_LR", "0.01", status=2)
    (line,) = errors(output)
    assert "SOLVER.BASE_LR is 0.01; allowed: 0.001, as in the training to resume" in line
    assert {path.name for path in (train.folder / "other").glob("*.pth")} == before
