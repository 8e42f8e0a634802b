import numpy as np
import pytest
import torch

from d2scale.cli import main
from d2scale.coco.records import CocoDataset, Records, starts_from_counts
from d2scale.config import load_cfg
from d2scale.engine.memory import filling, measure
from d2scale.errors import ConfigError, DataError
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase
from d2scale.planning.plan import make_plan

MEASURED = MemoryProfile((Phase("backward", GIB, GIB),), "measured")


def dataset(images=40, boxes=3):
    """Landscape images, in memory; their files are not there and not needed."""
    counts = np.full(images, boxes)
    records = Records(
        np.array([b"a.jpg"] * images),
        np.arange(images),
        np.full(images, 480),
        np.full(images, 640),
        starts_from_counts(counts),
        np.zeros((counts.sum(), 4), dtype=np.float32),
        np.zeros(counts.sum(), dtype=np.int64),
    )
    return CocoDataset("shapes", ("thing",), (1,), records, "")


@pytest.fixture(autouse=True)
def training_set(monkeypatch):
    def use(found):
        for module in (filling, measure):
            monkeypatch.setattr(module, "load_training_dataset", lambda cfg: found)

    use(dataset())
    return use


def config(recipes, *opts, budget="0.25"):
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "D2SCALE.MEMORY.BUDGET_GIB", budget)
    return load_cfg(str(recipes / "small-cpu.yaml"), [*sizes, *opts])


def never():
    raise AssertionError("nothing is to be measured here")


def hardware(cfg, method="max_memory", measure=never):
    return filling.hardware_for_training(cfg, 1, method=method, measure=measure)


def test_without_a_gpu_the_recipe_is_predicted_on_its_own_dataset(recipes):
    cfg = config(recipes, budget="1")
    found = hardware(cfg)
    assert found.profile.source == "predicted"
    assert "96x128 pixels with 3 boxes (40 images of shapes)" in found.profile.description
    plan = make_plan(cfg, found, method="max_memory")
    assert plan.ims_per_gpu > 1
    assert any("as predicted" in note for note in plan.notes)


@pytest.mark.parametrize("method", ["keep_total", "per_gpu", None])
def test_other_methods_ask_for_nothing(recipes, method):
    assert hardware(config(recipes), method).profile is None


def test_the_users_choice_of_images_asks_for_nothing(recipes):
    assert hardware(config(recipes, "D2SCALE.IMS_PER_GPU", "3")).profile is None


@pytest.fixture
def a_gpu(monkeypatch):
    class Properties:
        total_memory = 16 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)


def test_on_a_gpu_it_is_measured(recipes, a_gpu):
    cfg = config(recipes, "MODEL.DEVICE", "cuda", budget="0")
    found = hardware(cfg, measure=lambda: MEASURED)
    assert found.profile is MEASURED
    assert found.room_gib == 16
    assert make_plan(cfg, found, method="max_memory").ims_per_gpu == 15


def test_on_a_gpu_it_is_predicted_if_it_is_not_to_be_measured(recipes, a_gpu):
    cfg = config(recipes, "MODEL.DEVICE", "cuda", "D2SCALE.MEMORY.PROBE", "False", budget="0")
    assert hardware(cfg).profile.source == "predicted"


def test_a_budget_beyond_the_gpu_is_refused(recipes, a_gpu):
    with pytest.raises(ConfigError, match=r"at most the 16\.00 GiB of the device"):
        hardware(config(recipes, "MODEL.DEVICE", "cuda", budget="17"))


def test_measuring_on_a_simulated_device_finds_what_real_steps_hold(recipes):
    cfg = config(recipes, budget="0.1")
    profile = measure.measure_profile(cfg)
    largest = profile.largest_ims_per_gpu(0.1 * GIB)
    assert largest >= 2
    assert profile.source == "measured"
    assert "as a device of 0.10 GiB" in profile.description
    assert any(point.ims_per_gpu == largest for point in profile.points)
    assert max(point.reserved_bytes for point in profile.points) <= 0.1 * GIB


def test_no_more_images_are_tried_than_there_are(recipes, training_set):
    training_set(dataset(images=2))
    profile = measure.measure_profile(config(recipes, budget="1"))
    assert max(point.ims_per_gpu for point in profile.points) == 2


def test_a_dataset_without_annotations_is_refused(recipes, training_set):
    training_set(dataset(boxes=0))
    with pytest.raises(DataError, match="images with boxes"):
        measure.measure_profile(config(recipes))


def test_a_device_too_small_for_one_image_is_told_by_how_much_and_what_would_fit(recipes):
    with pytest.raises(
        ConfigError, match=r"GiB are missing; (what would fit|no precision)"
    ) as raised:
        measure.measure_profile(config(recipes, budget="0.03"))
    assert "\n" not in str(raised.value)


def test_a_simulated_device_needs_a_size(recipes):
    with pytest.raises(ConfigError, match="above 0 GiB"):
        measure.measure_profile(config(recipes, budget="0"))


def test_measuring_without_a_gpu_is_a_mistake(recipes, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["memory", str(recipes / "small-cpu.yaml"), "--device", "cuda"]) == 2
    assert "--device cpu, which predicts" in capsys.readouterr().err
