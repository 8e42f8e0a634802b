"""d2go's own command resumes by images seen: another world size, another method, old files."""

import json
import shutil

import pytest
import torch

from d2go_commands import META_FCOS, D2Go, errors

pytestmark = pytest.mark.timeout(900)

RECIPE = (
    META_FCOS
    + """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 4, STEPS: [3], WARMUP_ITERS: 1,
         BASE_LR: 0.001, CHECKPOINT_PERIOD: 2, AUTO_SCALING_METHODS: [d2scale_per_gpu]}
TEST: {FINAL_EVAL: false}
WRITER_PERIOD: 1
SEED: 3
"""
)


@pytest.fixture
def train(d2go):
    def run(processes, *arguments, status=0):
        return d2go(RECIPE, *arguments, processes=processes, status=status)

    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, datasets):
    """A folder as two processes leave it that were killed after iteration 1 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    D2Go(folder, datasets)(RECIPE, processes=2)
    out = folder / "out"
    for name in ("model_0000003.pth", "model_final.pth"):
        (out / name).unlink()
    (out / "last_checkpoint").write_text("model_0000001.pth")
    lines = (out / "metrics.json").read_text().splitlines(keepends=True)
    (out / "metrics.json").write_text("".join(lines[:2]))
    return out


@pytest.fixture
def halfway(stopped, tmp_path):
    """Another such folder, where ``train`` goes on."""
    return shutil.copytree(stopped, tmp_path / "out")


def rates(out):
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["lr"] for line in lines}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def test_two_processes_then_one(train, halfway):
    output = train(1, "--resume")
    assert "8 images seen in 2 iterations: going on with iteration 4 of 8" in output
    assert "Starting training from iteration 4" in output
    assert "sampler begins its order anew" in output
    assert "| total batch" in output
    # Half the batch at half the rate, which drops at 12 images, in iteration 6.
    found = rates(halfway)
    assert list(found) == [0, 1, 4, 5, 6, 7]
    assert list(found.values()) == pytest.approx(
        [found[0], 0.001, 0.0005, 0.0005, 0.00005, 0.00005]
    )
    record = load(halfway / "model_final.pth")["d2scale"]
    assert (record["start_iteration"], record["images_before"]) == (4, 8)
    # And back: 16 images are seen, nothing is left.
    assert "16 images seen in 8 iterations: going on with iteration 4 of 4" in train(2, "--resume")


def test_another_method_keeps_the_total_batch(train, halfway):
    method = ("SOLVER.AUTO_SCALING_METHODS", "('d2scale_keep_total',)")
    output = train(1, "--resume", *method)
    assert "going on with iteration 2 of 4" in output
    assert list(rates(halfway)) == [0, 1, 2, 3]
    assert rates(halfway)[3] == pytest.approx(0.0001)


def test_old_checkpoint(train, halfway):
    path = halfway / "model_0000001.pth"
    content = load(path)
    del content["d2scale"]
    torch.save(content, path)
    output = train(1, "--resume")
    assert "assuming this recipe, run at its own total batch, so 2 iterations of 4" in output
    assert "going on with iteration 4 of 8" in output


def test_changed_recipe(train, halfway):
    before = {path.name for path in halfway.glob("*.pth")}
    output = train(1, "--resume", "SOLVER.BASE_LR", "0.01", status=2)
    (line,) = errors(output)
    assert "SOLVER.BASE_LR is 0.01; allowed: 0.001, as in the training to resume" in line
    assert {path.name for path in halfway.glob("*.pth")} == before
    allowed = ("D2SCALE.ALLOW_CHANGED_RECIPE", "True")
    train(1, "--resume", "SOLVER.BASE_LR", "0.01", *allowed)
    assert rates(halfway)[4] == pytest.approx(0.005)
