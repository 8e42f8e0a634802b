"""A config's own datasets in the engine for plain detectron2."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from d2scale import cli
from d2scale.coco.images import read_rgb
from detectron2_commands import RETINANET, Trainings, errors
from own_data import OwnData, injection, odd_images

RECIPE = RETINANET.replace("coco_2017_train", "mine").replace("coco_2017_val", "mine")
RECIPE = RECIPE.replace("NUM_CONVS: 1", "NUM_CONVS: 1, NUM_CLASSES: 6")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def data(tmp_path):
    return OwnData(tmp_path / "data")


def test_spawned_ranks_train_and_evaluate_on_it(data, tmp_path):
    train = Trainings(tmp_path, tmp_path, RECIPE + injection(data))
    short = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
    train("out", *short, processes=2)
    assert '"bbox/AP"' in (tmp_path / "out/metrics.json").read_text()
    data.content["annotations"].pop()
    data.write()
    (line,) = errors(train("out", "--resume", *short, status=2))
    assert line.startswith("d2scale: error: annotations of mine (digest) is ")


def test_two_configs_of_a_process_do_not_fight(data, tmp_path):
    from detectron2.data import DatasetCatalog

    from d2scale.detectron2.config import load_cfg
    from d2scale.detectron2.datasets import register_datasets

    path = tmp_path / "recipe.yaml"
    for images, one in ((6, data), (2, OwnData(tmp_path / "other", images=2))):
        path.write_text(RECIPE + injection(one))
        for _ in range(2):
            register_datasets(load_cfg(str(path)))
            assert len(DatasetCatalog.get("mine")) == images


def _without_areas(data):
    for entry in data.content["annotations"]:
        del entry["area"], entry["iscrowd"]
    data.write()


def _with_an_area_that_is_null(data):
    data.content["annotations"][0]["area"] = None
    data.write()


@pytest.mark.parametrize(
    ("spoil", "words", "told"),
    [
        (
            lambda data: None,
            ["MODEL.RETINANET.NUM_CLASSES", "80"],
            "is 80; allowed: 6, the classes",
        ),
        (lambda data: data.json_file.unlink(), [], "labels.json not found; correct the path"),
        (lambda data: data.json_file.write_text("{"), [], "allowed: annotations in COCO's format"),
        (lambda data: data.json_file.write_text("[" * 99_999), [], "annotations in COCO's format"),
        (_with_an_area_that_is_null, [], "add area, or leave the dataset out of DATASETS.TEST"),
        (_without_areas, [], "add area and iscrowd, or leave the dataset out of DATASETS.TEST"),
        (lambda data: None, ["DATASETS.TEST", "('yours',)"], "DATASETS.TEST is 'yours'"),
    ],
)
def test_mistakes_are_a_line_each_before_anything_is_written(
    data, tmp_path, capsys, monkeypatch, spoil, words, told
):
    monkeypatch.chdir(tmp_path)
    spoil(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + injection(data))
    assert cli.main(["train", "--config-file", str(path), *words]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert told in line
    assert not (tmp_path / "output").exists()


def test_a_name_of_detectron2_is_taken(data, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("mine", "voc_2007_train") + injection(data, names=["voc_2007_train"])
    path.write_text(text)
    assert cli.main(["train", "--config-file", str(path)]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert "NAMES is 'voc_2007_train'; allowed: a name that detectron2 has not yet" in line


def test_config_of_a_run_without_own_datasets_has_none_of_the_keys(tmp_path):
    from d2scale.detectron2.config import load_cfg, without_default_keys

    path = tmp_path / "recipe.yaml"
    path.write_text(RETINANET)
    assert "D2GO_DATA" not in without_default_keys(load_cfg(str(path)))
    path.write_text(RETINANET + "D2GO_DATA: {DATASETS: {COCO_INJECTION: {NAMES: [mine]}}}")
    kept = without_default_keys(load_cfg(str(path)))
    assert json.dumps(kept["D2GO_DATA"]) == '{"DATASETS": {"COCO_INJECTION": {"NAMES": ["mine"]}}}'


@pytest.mark.parametrize("kind", [*odd_images(Image.new("RGB", (2, 2)))])
def test_images_of_every_kind_are_read_as_detectron2_does(kind, tmp_path):
    from detectron2.data.detection_utils import read_image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    other, options = odd_images(Image.fromarray(pixels))[kind]
    path = str(tmp_path / "image")
    other.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a palette with transparency
        expected = read_image(path, "RGB")
    assert np.array_equal(read_rgb(path), expected)
