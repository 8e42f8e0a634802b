from __future__ import annotations

import itertools
import multiprocessing
import warnings

import pytest
import torch
from PIL import Image

from d2scale.coco.dataset import load_dataset, load_training_dataset
from d2scale.config.defaults import get_cfg
from d2scale.engine.data.loader import build_test_loader, build_train_loader
from d2scale.errors import CheckpointError, DataError
from d2scale.planning.rules import split_evenly

# Forking is what torch's data loader does; Python 3.12 warns of it where threads run.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def cfg(coco):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 40, 48)
    cfg.INPUT.MIN_SIZE_TEST = 36
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def make_loader(cfg, *, world_size=1, rank=0, batch=5, **options):
    dataset = load_training_dataset(cfg)
    options = {"seed": 3, **options}
    return build_train_loader(
        cfg, dataset, world_size=world_size, rank=rank, ims_per_batch=batch, **options
    )


def take(loader, steps):
    with loader:
        return list(itertools.islice(loader, steps))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key])
                assert value.dtype == other[key].dtype
            else:
                assert value == other[key]


def test_samples_are_what_a_model_expects(cfg, coco):
    (step,) = take(make_loader(cfg), 1)
    assert len(step) == 5
    sample = step[0]
    assert set(sample) == {
        *("image", "boxes", "classes", "height", "width", "image_id", "file_name")
    }
    assert sample["image"].dtype == torch.uint8
    assert sample["boxes"].dtype == torch.float32
    assert sample["classes"].dtype == torch.int64
    assert sample["boxes"].shape == (len(sample["classes"]), 4)
    assert sample["file_name"] == str(coco.images / f"{sample['image_id']}.png")
    for sample in step:
        height, width = sample["image"].shape[1:]
        assert min(height, width) in (32, 40, 48)
        assert abs(height / width - sample["height"] / sample["width"]) < 0.05
        assert (sample["boxes"] <= torch.tensor([width, height] * 2)).all()


def test_boxes_follow_the_mirrored_image(cfg):
    """Paint a box into the file; the sample's box must hold the paint, mirrored or not."""
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    dataset = load_training_dataset(cfg)
    for number in range(len(dataset)):
        record = dataset.records[number]
        x0, y0, x1, y1 = record.boxes[0].astype(int)
        canvas = Image.new("RGB", (record.width, record.height))
        canvas.paste((255, 0, 0), (x0, y0, x1, y1))
        canvas.save(record.file_name)
    for sample in itertools.chain(*take(make_loader(cfg), 4)):
        x0, y0, x1, y1 = sample["boxes"][0].round().int().tolist()
        red = sample["image"][2]
        assert red[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() > 100
        inside = int(red[y0:y1, x0:x1].sum())
        assert inside > 0.9 * int(red.sum())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_samples(cfg, workers):
    expected = take(make_loader(cfg), 3)
    cfg.DATALOADER.NUM_WORKERS = workers
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = take(make_loader(cfg), 3)
    for left, right in zip(expected, found, strict=True):
        assert_same(left, right)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
def test_ranks_share_the_steps_of_one_rank(cfg, world_size, exact):
    whole = take(make_loader(cfg, exact=exact), 3)
    parts = [
        take(make_loader(cfg, world_size=world_size, rank=rank, exact=exact), 3)
        for rank in range(world_size)
    ]
    assert tuple(len(part[0]) for part in parts) == split_evenly(5, world_size)
    for number, step in enumerate(whole):
        assert_same(step, list(itertools.chain(*(part[number] for part in parts))))


def test_exact_steps_are_padded_to_their_largest_image(cfg):
    for step in take(make_loader(cfg, exact=True), 4):
        heights, widths = zip(*(sample["image"].shape[1:] for sample in step), strict=True)
        assert {sample["pad_to"] for sample in step} == {(max(heights), max(widths))}


def test_grouping_follows_the_config(cfg):
    for step in take(make_loader(cfg, batch=4), 6):
        assert len({sample["width"] > sample["height"] for sample in step}) == 1
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    mixed = take(make_loader(cfg, batch=4), 1)[0]
    assert {sample["image_id"] for sample in mixed} == {1, 2, 3, 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_state_counts_steps_handed_out_not_made_ahead(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    undisturbed = take(make_loader(cfg), 6)
    loader = make_loader(cfg)
    assert loader.state_dict() == make_loader(cfg).state_dict()
    take(loader, 4)
    state = loader.state_dict()
    assert state["epoch"] * state["size"] + state["position"] - len(state["waiting"]) == 4 * 5
    rest = take(make_loader(cfg, seed=0, start_state=state), 2)
    for left, right in zip(undisturbed[4:], rest, strict=True):
        assert_same(left, right)


def test_a_closed_loader_goes_on_where_it_was(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    undisturbed = take(make_loader(cfg), 3)
    loader = make_loader(cfg)
    for step in undisturbed:
        assert_same(take(loader, 1)[0], step)
        assert not multiprocessing.active_children()


def test_state_of_another_dataset_is_refused(cfg):
    state = {**make_loader(cfg).state_dict(), "size": 5}
    with pytest.raises(CheckpointError, match=r"sampler.size is 5"):
        make_loader(cfg, start_state=state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_spoiled_image_stops_the_run_with_its_name(cfg, coco, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = make_loader(cfg)
    (coco.images / "2.png").write_bytes(b"spoiled")
    with pytest.raises(DataError) as caught:
        list(itertools.islice(loader, 10))
    assert str(caught.value).startswith(f"image file is {str(coco.images / '2.png')!r}")
    assert len(caught.value.faults) == 1
    assert not multiprocessing.active_children()


def test_another_size_than_annotated_is_told(cfg, coco):
    coco.content["images"][0]["width"] += 1
    coco.write()
    with pytest.raises(DataError, match=r"1.png is '60 x 40'; allowed: 61 x 40"):
        take(make_loader(cfg), 4)


def test_random_state_of_the_run_is_left_alone(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    before = torch.get_rng_state()
    take(make_loader(cfg), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_once(cfg, workers, world_size):
    cfg.DATALOADER.NUM_WORKERS = workers
    dataset = load_dataset("coco_pretrain_train_base")
    loaders = [
        build_test_loader(cfg, dataset, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    assert tuple(map(len, loaders)) == split_evenly(4, world_size)
    for _ in range(2):
        items = [item for loader in loaders for item in loader]
        assert all(len(item) == 1 for item in items)
        assert [item[0]["image_id"] for item in items] == [1, 2, 3, 4]
        assert [min(item[0]["image"].shape[1:]) for item in items] == [36] * 4
        assert "boxes" not in items[0][0]
    assert not multiprocessing.active_children()


def test_leaving_an_evaluation_early_ends_its_workers(cfg):
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_test_loader(cfg, load_dataset("coco_2017_train"), world_size=1, rank=0)
    steps = iter(loader)
    next(steps)
    assert multiprocessing.active_children()
    steps.close()
    assert not multiprocessing.active_children()


def test_real_coco_gives_the_same_steps_on_one_and_two_ranks(cfg, real_coco, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_coco))
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96)
    whole = take(make_loader(cfg, batch=16, exact=True), 2)
    parts = [take(make_loader(cfg, world_size=2, rank=r, batch=16, exact=True), 2) for r in (0, 1)]
    for number in range(2):
        assert_same(whole[number], parts[0][number] + parts[1][number])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_images_for_a_gpu_are_in_pinned_memory(cfg, workers):
    expected = take(make_loader(cfg), 2)
    cfg.MODEL.DEVICE = "cuda"
    cfg.DATALOADER.NUM_WORKERS = workers
    found = take(make_loader(cfg), 2)
    assert all(sample["image"].is_pinned() for sample in itertools.chain(*found))
    for left, right in zip(expected, found, strict=True):
        assert_same(left, right)
