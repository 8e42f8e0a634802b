"""A config's own datasets under the Runner: d2go registers them, d2scale checks them first."""

import pytest
import yaml

from d2go_commands import D2SCALE_TRAIN, META_FCOS, errors
from own_data import OwnData, injection

SMALL = """
DATASETS: {TRAIN: [mine], TEST: [mine]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 2, MAX_ITER: 1, STEPS: [], WARMUP_ITERS: 0}
"""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def data(tmp_path):
    return OwnData(tmp_path / "data", images=3)


def test_d2go_trains_on_it_and_the_classes_follow(d2go, data, tmp_path):
    output = d2go(META_FCOS + SMALL + injection(data), processes=2)
    assert "Inject coco dataset mine" in output
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert written["MODEL"]["FCOS"]["NUM_CLASSES"] == data.classes
    assert list((tmp_path / "out").glob("inference/default/final/mine*"))


def test_mistakes_are_told_before_anything_is_written(d2go, data, tmp_path):
    wrong = ["MODEL.FCOS.NUM_CLASSES", "60"]
    recipe = META_FCOS + SMALL + injection(data)
    (line,) = errors(d2go(recipe, *wrong, name=D2SCALE_TRAIN, status=2))
    assert "MODEL.FCOS.NUM_CLASSES is 60; allowed: " in line
    data.json_file.unlink()
    (line,) = errors(d2go(recipe, name=D2SCALE_TRAIN, status=2))
    assert "labels.json not found" in line
    assert not (tmp_path / "out").exists()


def test_two_trainings_of_a_process_do_not_fight(data, tmp_path, write_config):
    from detectron2.data import DatasetCatalog

    from d2scale.d2go.runner import Runner

    for images, one in ((3, data), (2, OwnData(tmp_path / "other", images=2))):
        cfg = Runner.get_default_cfg()
        cfg.merge_from_file(write_config(META_FCOS + SMALL + injection(one)))
        cfg.OUTPUT_DIR = str(tmp_path / "out")
        Runner().register(cfg)
        assert len(DatasetCatalog.get("mine")) == images
        assert one.classes == cfg.MODEL.FCOS.NUM_CLASSES
