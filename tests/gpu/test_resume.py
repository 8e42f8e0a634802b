"""A run goes on on another kind of device: CPU to GPU, and back."""

from __future__ import annotations

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from devices import GPU, tf32
from small_detector import distance
from training_processes import RECIPE

MOVES = [
    ("cpu", "cpu"),
    *(pytest.param(*move, marks=GPU) for move in (("cpu", "cuda"), ("cuda", "cpu"))),
    pytest.param("cuda", "cuda", marks=GPU),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    """Run a recipe in a folder on a device, and return its weights."""
    root = tmp_path_factory.mktemp("devices")
    write_shapes_dataset(root, 20, 2, image_size=(64, 96))
    path = root / "recipe.yaml"
    path.write_text(RECIPE)

    def run(folder, device, *, resume=False):
        opts = ["MODEL.DEVICE", device, "OUTPUT_DIR", str(root / folder)]
        with pytest.MonkeyPatch.context() as patch, tf32(False):
            patch.setenv("DETECTRON2_DATASETS", str(root))
            train(load_cfg(str(path), opts), resume=resume)
        content = torch.load(root / folder / "model_final.pth", weights_only=True)
        return {name: value.double().cpu() for name, value in content["model"].items()}

    run.root = root
    return run


@pytest.fixture(scope="module")
def undisturbed(run):
    return run("undisturbed", "cpu")


@pytest.mark.parametrize(("first", "second"), MOVES)
def test_a_run_goes_on_on_another_device(first, second, run, undisturbed, record_property):
    folder = run.root / f"{first}-{second}"
    run(folder.name, first)
    kept = folder / "model_0000003.pth"
    for checkpoint in folder.glob("model_*.pth"):
        if checkpoint != kept:
            checkpoint.unlink()
    (folder / "last_checkpoint").write_text(kept.name)
    error = distance(run(folder.name, second, resume=True), undisturbed)
    record_property("relative error of the weights", f"{error:.2g}")
    assert error < 1e-4
