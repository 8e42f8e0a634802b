"""Micro-batches and the guard inside d2go's own training loop."""

import json

import pytest
import torch

from d2go_commands import META_FCOS, RETINANET

pytestmark = pytest.mark.timeout(900)

COMMON = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
D2GO_DATA: {AUG_OPS: {TRAIN: ["ResizeShortestEdgeOp"]}}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 100, BASE_LR: 0.001}
TEST: {FINAL_EVAL: false}
PROFILERS: []
WRITER_PERIOD: 1
SEED: 1
"""


@pytest.fixture
def train(d2go, tmp_path):
    """Run ``d2go.train_net``; return the folder and all that it said."""

    def run(name, config, processes, *arguments, fail=None, status=0):
        runner = "d2scale.Runner" if fail is None else "failing_runner.FailingRunner"
        output = d2go(
            *(config + COMMON, *arguments),
            out=name,
            processes=processes,
            runner=runner,
            status=status,
            **{f"FAIL_{key}": value for key, value in (fail or {}).items()},
        )
        return tmp_path / name, output

    return run


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines]


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_same_training(found, expected):
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_train_as_d2go_alone_does(train, processes):
    plain, _ = train("plain", META_FCOS, processes, "D2SCALE.ON_OOM", "raise")
    split, output = train("split", META_FCOS, processes, "D2SCALE.IMS_PER_GPU", "1")
    assert "images per GPU, in one forward      | 1" in output or "images per GPU" in output
    assert "is approximate" not in output
    assert_same_training(split, plain)


def test_gradients_cross_the_network_in_float16_where_asked(train):
    compress = ("MODEL.DDP_FP16_GRAD_COMPRESS", "True", "SOLVER.BASE_LR", "0.1")
    folders = [
        train("full", META_FCOS, 2, "SOLVER.BASE_LR", "0.1")[0],
        train("compressed", META_FCOS, 2, *compress)[0],
        train("d2go", META_FCOS, 2, *compress, "D2SCALE.ON_OOM", "raise")[0],
    ]
    full, compressed, expected = (
        torch.cat([value.flatten() for value in weights(folder).values()]) for folder in folders
    )
    distance = torch.dist(full, expected)
    assert distance > 0
    assert torch.dist(compressed, expected) < 0.1 * distance


def test_error_on_one_of_two_ranks_changes_nothing(train):
    whole, _ = train("whole", META_FCOS, 2)
    # Rank 1 has no room for 2 images from its second step on.
    split, output = train("split", META_FCOS, 2, fail={"FROM": 1, "IMAGES": 2, "RANK": 1})
    assert "Out of memory in forward or backward on rank 1" in output
    assert "Out of memory in forward or backward on rank 1" in (split / "log.txt").read_text()
    assert json.loads((split / "plan.json").read_text())["ims_per_gpu"] == 1
    assert_same_training(split, whole)


def test_image_that_does_not_fit_leaves_the_last_good_step(train):
    folder, output = train("run", META_FCOS, 1, fail={"FROM": 2, "IMAGES": 1, "RANK": 0}, status=2)
    assert "d2scale: error: out of memory in forward or backward" in output
    assert "Traceback" not in output
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"


def test_other_models_run_the_recipes_ranks_in_turn(train):
    one, output = train("one", RETINANET, 1)
    assert json.loads((one / "plan.json").read_text())["virtual_ranks"] == 2
    assert "approximate" not in output
    two, _ = train("two", RETINANET, 2)
    assert_same_training(two, one)


def test_without_virtual_ranks_other_models_are_split_approximately(train):
    off = ("D2SCALE.VIRTUAL_RANKS", "off")
    folder, output = train("run", RETINANET, 1, "D2SCALE.IMS_PER_GPU", "1", *off)
    assert "approximate for this model: RetinaNet does not tell its loss normalizers" in output
    assert len(losses(folder)) == 3


def test_model_that_is_watched_keeps_its_own_step(train):
    arguments = ("ABNORMAL_CHECKER.ENABLED", "True")
    _, output = train("warned", META_FCOS, 1, *arguments)
    assert "ends this run: d2go trains it with the wrapper AbnormalLossCheckerWrapper" in output
    _, output = train("refused", META_FCOS, 1, *arguments, "D2SCALE.IMS_PER_GPU", "2", status=2)
    assert "D2SCALE.IMS_PER_GPU is 2; allowed: 4, the images of a GPU, with the wrapper" in output
