"""Run folders and a test set, small and made by hand."""

import json

import pytest
import yaml

from d2scale.coco.shapes import write_shapes_dataset
from run_folders import step_lines

TEST_SET = "coco_pretrain_val_base"
TEST_IMAGES = 12


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """A folder that holds coco/ with twelve drawn test images."""
    root = tmp_path_factory.mktemp("shapes")
    return write_shapes_dataset(root, 1, TEST_IMAGES, image_size=(64, 96))


@pytest.fixture
def shapes(shapes_root, monkeypatch):
    """The drawn test images, as what the dataset names mean."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_root))
    return shapes_root


@pytest.fixture
def make_run(tmp_path):
    """Make a run folder of d2scale and return its path; None leaves a file out."""

    def make(
        name="run",
        lines=None,
        results=None,
        found=None,
        config=None,
        plan=None,
        machine=None,
    ):
        folder = tmp_path / name
        (folder / "inference").mkdir(parents=True)
        batch = (config or {}).get("SOLVER", {}).get("IMS_PER_BATCH", 8)
        lines = step_lines(batch=batch) if lines is None else lines
        if results:
            told = {f"bbox/{key}": value for key, value in results.items()}
            last = {key: lines[-1][key] for key in ("iteration", "images_seen")}
            lines = [*lines, {**told, **last, "elapsed_seconds": 99.0}]
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {
            "DATASETS": {"TRAIN": ["coco_pretrain_train_base"], "TEST": [TEST_SET]},
            "SOLVER": {"IMS_PER_BATCH": 8, "BASE_LR": 0.01, "MAX_ITER": 20, "STEPS": [10, 15]},
            "TEST": {"DETECTIONS_PER_IMAGE": 100},
            "D2SCALE": {"EXACT": True},
            "MODEL": {"WEIGHTS": ""},
        }
        for section, keys in (config or {}).items():
            settings[section] = {**settings.get(section, {}), **keys}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        content = {"method": "keep_total", "world_size": 2, "ims_per_gpu": 4}
        content |= {"accumulation_steps": 1, "ims_per_batch": batch, "predicted_peak_gib": None}
        (folder / "plan.json").write_text(json.dumps({**content, **(plan or {})}))
        if machine:
            (folder / "machine.json").write_text(json.dumps(machine))
        if found is not None:
            path = folder / "inference" / "coco_instances_results.json"
            path.write_text(json.dumps(found))
        return folder

    return make
