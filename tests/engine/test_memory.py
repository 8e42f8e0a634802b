import numpy as np
import pytest
import torch

from d2scale.cli import main
from d2scale.coco.records import CocoDataset, Records, starts_from_counts
from d2scale.config import get_cfg, load_cfg
from d2scale.engine import memory
from d2scale.engine.memory import measure_profile, predict_profile, worst_case_of
from d2scale.errors import ConfigError, DataError
from d2scale.planning.memory_profile import GIB
from landscapes import landscapes


@pytest.fixture(autouse=True)
def training_set(monkeypatch):
    def use(dataset):
        monkeypatch.setattr(memory, "load_training_dataset", lambda cfg: dataset)

    use(landscapes())
    return use


def config(recipes, *opts, budget="0.25"):
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "D2SCALE.MEMORY.BUDGET_GIB", budget)
    return load_cfg(str(recipes / "small-cpu.yaml"), [*sizes, *opts])


def test_measuring_on_a_simulated_device_finds_what_real_steps_hold(recipes):
    cfg = config(recipes, budget="0.1")
    profile = measure_profile(cfg)
    largest = profile.largest_ims_per_gpu(0.1 * GIB)
    assert largest >= 2
    assert profile.source == "measured"
    assert "as a device of 0.10 GiB" in profile.description
    assert any(point.ims_per_gpu == largest for point in profile.points)
    assert max(point.reserved_bytes for point in profile.points) <= 0.1 * GIB


def test_no_more_images_are_tried_than_there_are(recipes, training_set):
    training_set(landscapes(images=2))
    profile = measure_profile(config(recipes, budget="1"))
    assert max(point.ims_per_gpu for point in profile.points) == 2


def test_a_dataset_without_annotations_is_refused(recipes, training_set):
    training_set(landscapes(boxes=0))
    with pytest.raises(DataError, match="images with boxes"):
        measure_profile(config(recipes))


def test_a_device_too_small_for_one_image_is_told_by_how_much_and_what_would_fit(recipes):
    with pytest.raises(
        ConfigError, match=r"GiB are missing; (what would fit|no precision)"
    ) as raised:
        measure_profile(config(recipes, budget="0.03"))
    assert "\n" not in str(raised.value)


def test_a_simulated_device_needs_a_size(recipes):
    with pytest.raises(ConfigError, match="above 0 GiB"):
        measure_profile(config(recipes, budget="0"))


def test_measuring_without_a_gpu_is_a_mistake(recipes, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["memory", str(recipes / "small-cpu.yaml"), "--device", "cuda"]) == 2
    assert "--device cpu, which predicts" in capsys.readouterr().err


def dataset(*images):
    """A dataset of images of (height, width, boxes)."""
    heights, widths, boxes = (np.array(column) for column in zip(*images, strict=True))
    records = Records(
        np.array([b"a.jpg"] * len(images)),
        np.arange(len(images)),
        heights,
        widths,
        starts_from_counts(boxes),
        np.zeros((boxes.sum(), 4), dtype=np.float32),
        np.zeros(boxes.sum(), dtype=np.int64),
    )
    return CocoDataset("shapes", ("thing",), (1,), records, "")


def resizing(grouping=True, sizes=(640, 800)):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = sizes
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    return cfg


def test_a_dataset_of_one_shape_is_padded_to_that_shape():
    worst_case = worst_case_of(resizing(), dataset((480, 640, 3), (480, 640, 17)))
    assert worst_case.sizes == ((800, 1067),)
    assert worst_case.boxes == 17
    assert worst_case.origin == "2 images of shapes"


def test_the_highest_and_the_widest_image_may_meet_in_a_batch():
    images = dataset((500, 510, 1), (200, 640, 1), (640, 480, 1))
    assert worst_case_of(resizing(), images).sizes == ((800, 1333), (1067, 800))
    assert worst_case_of(resizing(grouping=False), images).sizes == ((1067, 1333),)


def test_images_of_their_own_size_need_the_dataset():
    with pytest.raises(ConfigError, match="MIN_SIZE_TRAIN"):
        predict_profile(resizing(sizes=(0,)))
    assert worst_case_of(resizing(sizes=(0,)), dataset((480, 640, 1))).size == (480, 640)
