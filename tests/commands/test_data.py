"""``d2scale data``: what it says of a dataset, and where it finds it."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image

from d2scale.cli import main
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from own_data import RECIPE, OwnData, injection


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return OwnData(tmp_path / "leaves", images=10)


@pytest.fixture
def tell(capsys):
    """Run the command; return what it prints, and its error lines."""

    def run(*words, status=0):
        assert main(["data", *map(str, words)]) == status
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("d2scale: error: ")]
        return out, [line.removeprefix("d2scale: error: ") for line in errors]

    return run


def facts(text):
    lines = (line.partition(":") for line in text.splitlines() if not line.startswith("|"))
    return {name: value.strip() for name, _, value in lines}


def test_a_folder_is_told_in_numbers(data, tell):
    text, errors = tell(data.root)
    told = facts(text)
    boxes = [a for a in data.content["annotations"] if not a["iscrowd"]]
    assert errors == []
    assert told["dataset"] == "leaves"
    assert told["boxes"].startswith(f"{len(boxes)}, ")
    assert (told["images read"], told["faults"]) == ("10 of 10", "none")
    assert "10, 1 of them without boxes" in text
    kites = sum(a["category_id"] == 38 for a in boxes)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert next(row[3] for row in rows if "kite" in row) == str(kites)


def test_the_lines_for_a_config_train(data, tell, write_config):
    text, _ = tell(data.root, "--name", "mine")
    lines = text.partition("lines for a config:\n")[2]
    assert yaml.safe_load(lines)["D2GO_DATA"]["DATASETS"]["COCO_INJECTION"] == {
        "NAMES": ["mine"],
        "IM_DIRS": ["leaves/images"],
        "JSON_FILES": ["leaves/labels.json"],
    }
    config = write_config("_BASE_: d2scale://MetaFCOS/small-cpu.yaml\n" + lines)
    assert tell(config, "DATASETS.TEST", "()")[0].startswith("dataset:     mine\n")


@pytest.mark.parametrize("words", [["labels.json"], ["."], ["labels.json", "--images", "images"]])
def test_it_finds_the_parts_of_a_dataset(data, tell, monkeypatch, words):
    monkeypatch.chdir(data.root)
    assert facts(tell(*words)[0])["images"] == str(data.images)


def test_of_folders_that_hold_the_first_image_the_namesake_is_taken(data, tell):
    data.json_file.rename(data.root / "labels_val.json")
    (data.root / "train").mkdir()
    name = data.content["images"][0]["file_name"]
    (data.root / "train" / name).write_bytes(b"another image")
    (line,) = tell(data.root / "labels_val.json", status=2)[1]
    assert f"name that folder by --images (found: {data.images}, {data.root / 'train'})" in line
    data.images.rename(data.root / "val")
    assert facts(tell(data.root)[0])["images"] == str(data.root / "val")


def test_a_name_too_long_for_a_file_is_no_traceback(data, tell):
    data.content["images"][0]["file_name"] = "x" * 300 + ".jpg"
    data.write()
    (line,) = tell(data.root, status=2)[1]
    assert "name that folder by --images" in line
    lines = tell(data.root, "--images", data.images, status=2)[1]
    assert any("x" * 300 in line for line in lines)


def test_coco_is_found_in_its_own_layout(coco, tell):
    told = facts(tell("coco_pretrain_train_base")[0])
    assert (told["dataset"], told["faults"]) == ("coco_pretrain_train_base", "none")
    assert facts(tell(coco.root / "coco")[0])["images"] == str(coco.images)
    (coco.json_file.parent / "instances_val2017.json").write_text(coco.json_file.read_text())
    (line,) = tell(coco.root / "coco", status=2)[1]
    assert "instances_train2017.json" in line
    assert "name the file itself" in line


def _turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}


def test_images_of_other_kinds_are_told_and_are_no_faults(data, tell):
    names = [entry["file_name"] for entry in data.content["images"]]
    images = [Image.open(data.images / name).convert("RGB") for name in names]
    grey = np.asarray(images[3].convert("L")).astype(np.uint16)
    turned, options = _turned(images[4])
    for number, image, more in (
        (0, images[0].convert("L"), {}),
        (1, images[1].convert("P"), {"transparency": b"\x00\x01"}),
        (2, images[2].convert("CMYK"), {"format": "JPEG"}),
        (3, Image.fromarray(grey), {}),
        (4, turned, options),
    ):
        data.content["images"][number]["file_name"] = f"{number}.png"
        image.save(data.images / f"{number}.png", **{"format": "PNG", **more})
    data.write()
    text, errors = tell(data.root)
    assert errors == []
    for kind, number in (
        ("grayscale, read as RGB", 0),
        ("transparent in parts, read in the colour that is beneath", 1),
        ("CMYK, read as RGB", 2),
        ("of more than 8 bits, read as RGB where no value is above 255", 3),
        ("turned by their EXIF orientation, read upright", 4),
    ):
        assert f"odd images:  1 {kind} ({number}.png)" in text


def _spoil(data):
    images = data.content["images"]
    (data.images / images[0]["file_name"]).write_bytes(b"no image")
    images[1]["height"] += 1
    (data.images / images[2]["file_name"]).unlink()
    data.content["annotations"][0]["category_id"] = 999
    data.write()


def test_faults_are_those_of_training(data, tell, write_config):
    _spoil(data)
    text, told = tell(data.root, status=2)
    assert facts(text)["faults"] == "4"
    assert "lines for a config" not in text
    assert any("allowed: a readable image" in line for line in told)
    assert any(line.startswith("size of image ") for line in told)
    base = "_BASE_: d2scale://MetaFCOS/small-cpu.yaml\nDATASETS: {TRAIN: [mine], TEST: []}\n"
    with pytest.raises(ConfigError) as raised:
        train(load_cfg(write_config(base + injection(data))))
    assert set(str(raised.value).splitlines()) <= set(told)
    assert len(str(raised.value).splitlines()) == 2


def test_a_few_images_are_read_if_so_asked(data, tell):
    assert facts(tell(data.root, "--read", "3")[0])["images read"] == "3 of 10"


def test_no_boxes_and_classes_that_differ_are_told(data, tell, tmp_path, write_config):
    other = OwnData(tmp_path / "other", images=2, classes=3)
    base = "_BASE_: d2scale://MetaFCOS/small-cpu.yaml\nDATASETS: {TRAIN: [mine], TEST: [other]}\n"
    (line,) = tell(write_config(base + injection(data, other)), status=2)[1]
    assert line.startswith("DATASETS.TEST is 'other'; allowed: datasets with the 6 classes of mine")
    data.content["annotations"] = []
    data.write()
    (line,) = tell(data.root, status=2)[1]
    assert "allowed: datasets with boxes of their classes" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "PATH|NAME is 'nowhere'; allowed: a folder, a file .json or .yaml"),
        (["images"], "it has no JSON file"),
        (["labels.json", "--images", "nowhere"], "nowhere not found"),
        ([".", "DATASETS.TEST", "()"], "KEY VALUE is 'DATASETS.TEST ()'; allowed: none but"),
        (["coco_2017_val", "--images", "images"], "--images is 'images'; allowed: none but for a"),
        (["mine.yaml", "--name", "mine"], "--name is 'mine'; allowed: none but for a folder"),
        ([".", "--read", "0"], "--read is 0"),
        ([".", "-o", "sheet.txt"], "--output is 'sheet.txt'; allowed: a file .jpg"),
        (["nowhere.json"], "annotation file is 'nowhere.json'; allowed: a readable file"),
    ],
)
def test_mistakes_are_one_line(data, tell, monkeypatch, words, told):
    monkeypatch.chdir(data.root)
    _, (line,) = tell(*words, status=2)
    assert told in line


def test_the_sheet_shows_every_odd_image_and_boxes(data, tell, tmp_path):
    name = data.content["images"][9]["file_name"]
    size = Image.open(data.images / name).convert("L").size
    Image.new("L", size, 128).save(data.images / name)
    text, _ = tell(data.root, "-o", "sheet.jpg")
    assert "\nsheet:       sheet.jpg\n" in text
    sheet = np.asarray(Image.open(tmp_path / "sheet.jpg").convert("RGB")).astype(int)
    first = sheet[8 : 8 + 320, 8 : 8 + 400]  # a plain grey image, which has no boxes
    assert (abs(first - 128).max(axis=2) < 4).mean() > 0.5
    colours = sheet[8 : 8 + 320, 416 : 416 + 400]
    assert (np.ptp(colours, axis=2) > 120).any()  # a box


RETINANET = "MODEL: {META_ARCHITECTURE: RetinaNet}\nDATASETS: {TRAIN: [mine], TEST: [mine]}\n"


def test_the_verdict_is_that_of_the_recipes_engine(data, tell, write_config):
    for entry in data.content["annotations"]:
        del entry["area"]
    data.write()
    path = write_config(RETINANET + injection(data))
    key = "MODEL.RETINANET.NUM_CLASSES"
    number = f"{key} is 80; allowed: {data.classes}, the classes of mine; correct it"
    _, errors = tell(path, status=2)
    assert errors[0] == number
    assert "add area, or leave the dataset out of DATASETS.TEST" in errors[1]
    right = RETINANET.replace("RetinaNet", f"RetinaNet, RETINANET: {{NUM_CLASSES: {data.classes}}}")
    path = write_config(right + injection(data))
    _, (line,) = tell(path, status=2)
    assert "add area" in line
    assert tell(path, "DATASETS.TEST", "()")[1] == []
    # MetaFCOS follows the dataset, and d2scale's own metric measures the boxes.
    assert tell(write_config(RECIPE + injection(data)))[1] == []
    text, _ = tell(data.root)
    assert "note: detectron2 and d2go cannot evaluate on it: add area" in text
