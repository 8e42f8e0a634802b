"""The largest batches of a dataset, as real samples of d2go's mapper."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2scale.coco.sizes import output_size
from d2scale.errors import DataError

# (width, height) and instances: one wide and one high group, the crowded image not the largest.
IMAGES = [((160, 80), 1), ((120, 100), 5), ((100, 140), 2), ((90, 90), 3), ((200, 60), 2)]
KEYPOINTS = 17


def annotation(number, image, index, crowd=0):
    x, y = 3.0 + 2 * index, 5.0 + 3 * index
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [x, y, 30.0, 20.0],
        "area": 600.0,
        "iscrowd": crowd,
        "segmentation": [[x, y, x + 30, y, x + 30, y + 20, x, y + 20]],
        "keypoints": [x + 10, y + 10, 2] * KEYPOINTS,
        "num_keypoints": KEYPOINTS,
    }


def write_dataset(folder, images=IMAGES):
    entries, annotations = [], []
    for image, ((width, height), instances) in enumerate(images, start=1):
        pixels = np.random.default_rng(image).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{image}.png")
        entries.append({"id": image, "file_name": f"{image}.png", "width": width, "height": height})
        for index in range(instances):
            annotations.append(annotation(len(annotations) + 1, image, index))
    categories = [{"id": 1, "name": "person"}]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture
def cfg(tmp_path):
    """A small Mask R-CNN on a dataset with masks and keypoints."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    from d2scale.d2go.runner import Runner

    write_dataset(tmp_path)
    name = f"worst_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "instances.json"), str(tmp_path))
    names = [str(index) for index in range(KEYPOINTS)]
    MetadataCatalog.get(name).set(keypoint_names=names, keypoint_flip_map=[])
    cfg = Runner.get_default_cfg()
    settings = {
        "DATASETS.TRAIN": (name,),
        "INPUT.MIN_SIZE_TRAIN": (64, 96),
        "INPUT.MAX_SIZE_TRAIN": 160,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.MASK_ON": True,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (16,),
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
    }
    for key, value in settings.items():
        cfg.merge_from_list([key, value])
    yield cfg
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def find(cfg):
    from d2scale.d2go.memory import D2GoMemory

    return D2GoMemory(cfg).batches


def largest(images):
    sizes = [output_size(height, width, 96, 160) for width, height in images]
    return tuple(max(edges) for edges in zip(*sizes, strict=True))


def shapes(samples):
    return [tuple(sample["image"].shape[-2:]) for sample in samples]


def test_each_group_has_its_most_crowded_image_at_the_largest_padded_size(cfg):
    batches = find(cfg)
    wide = largest([(160, 80), (120, 100), (200, 60)])
    high = largest([(100, 140), (90, 90)])
    assert shapes(batches.largest) == [wide, high]
    assert [len(sample["instances"]) for sample in batches.largest] == [5, 3]
    assert (batches.size, batches.instances, batches.images) == (wide, 5, 5)
    assert all(np.less(shapes([batches.smaller])[0], wide))
    assert [len(batch) for batch in batches.trial_batches(3)] == [3] * 4


def test_without_groups_the_highest_and_the_widest_meet(cfg):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    batches = find(cfg)
    assert shapes(batches.largest) == [largest([size for size, _ in IMAGES])]
    assert batches.instances == 5


def test_samples_are_those_of_training_padded_as_a_larger_image_would_pad_them(cfg):
    from d2go.runner import GeneralizedRCNNRunner
    from detectron2.data import DatasetCatalog
    from detectron2.structures import ImageList

    cfg.D2GO_DATA.AUG_OPS.TRAIN = ["ResizeShortestEdgeOp"]
    (sample, _) = find(cfg).largest
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    mapper = GeneralizedRCNNRunner.get_mapper(cfg, is_train=True)
    expected = mapper(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[1])
    assert sample["image"].dtype == expected["image"].dtype
    polygons = zip(sample["instances"].gt_masks, expected["instances"].gt_masks, strict=True)
    assert all(np.array_equal(ours, theirs) for ours, theirs in polygons)
    larger = torch.zeros(3, *sample["image"].shape[-2:])
    padded = ImageList.from_tensors([expected["image"], larger]).tensor[0]
    assert torch.equal(sample["image"], padded)


def test_maps_of_classes_are_padded_with_what_the_loss_ignores():
    from d2scale.detectron2.worst_batches import _padded

    sample = {
        "image": torch.ones(3, 2, 3),
        "sem_seg": torch.ones(2, 3, dtype=torch.int64),
        "other": torch.ones(2),
    }
    padded = _padded(sample, 4, 5, ignore_value=255)
    assert padded["image"].shape == (3, 4, 5)
    assert padded["image"].sum() == 18
    assert padded["sem_seg"][3, 4] == 255
    assert padded["other"] is sample["other"]


def test_images_without_instances_are_refused(cfg, tmp_path):
    write_dataset(tmp_path, [((100, 100), 0)])
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with pytest.raises(DataError, match="images with boxes"):
        find(cfg)


@pytest.mark.parametrize("keypoints", [False, True], ids=["masks", "masks and keypoints"])
def test_models_that_need_more_than_boxes_are_predicted(cfg, keypoints):
    from d2scale.d2go.memory import D2GoMemory

    cfg.MODEL.KEYPOINT_ON = keypoints
    memory = D2GoMemory(cfg)
    before = torch.get_rng_state()
    profile = memory.profile()
    assert torch.equal(torch.get_rng_state(), before)
    assert "5 instances" in profile.description
    assert "real steps" in profile.description
    assert profile.peak_bytes(100) > profile.peak_bytes(1) > profile.gradient_bytes
    # Real steps in other precisions would take minutes on the CPU for larger models.
    assert memory.variants() == ()


def test_measuring_takes_real_steps_while_the_model_waits(cfg, monkeypatch):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.d2go.runner import Runner
    from d2scale.detectron2 import memory
    from d2scale.memory.devices import SimulatedDevice

    monkeypatch.setattr(memory, "_on_cuda", lambda cfg: True)
    monkeypatch.setattr(memory, "_cuda_device", lambda: SimulatedDevice(2**29))
    runner = Runner()
    model = runner.build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile = D2GoMemory(cfg, runner, model).profile()
    assert profile.source == "measured"
    assert 1 < profile.largest_ims_per_gpu(2**29) <= 5
    torch.testing.assert_close(model.state_dict(), before)


@pytest.mark.parametrize("measures", [False, True], ids=["predicted", "measured"])
def test_the_copy_of_the_weights_that_ema_keeps_counts(cfg, monkeypatch, measures):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.detectron2 import memory
    from d2scale.memory.devices import SimulatedDevice

    monkeypatch.setattr(memory, "_on_cuda", lambda cfg: measures)
    monkeypatch.setattr(memory, "_cuda_device", lambda: SimulatedDevice(2**29))

    def points():
        profile = D2GoMemory(cfg).profile()
        return {point.ims_per_gpu: point.live_bytes for point in profile.points}

    cfg.D2SCALE.MAX_IMS_PER_BATCH = 1
    plain = points()
    cfg.MODEL_EMA.ENABLED = True
    with_ema = points()
    state = D2GoMemory(cfg)._runner.build_model(cfg).state_dict()
    copy_bytes = sum(value.nbytes for value in state.values())
    assert with_ema[1] - plain[1] == pytest.approx(copy_bytes, rel=0.02)
    if not measures:
        cfg.MODEL_EMA.DEVICE = "another"
        assert points()[1] == pytest.approx(plain[1], rel=0.02)


def test_half_precision_is_counted_in_bfloat16_on_a_cpu(cfg):
    from d2scale.d2go.memory import D2GoMemory

    cfg.SOLVER.AMP.ENABLED = True
    step = D2GoMemory(cfg).workload(cfg).build_step(torch.device("cpu"))
    assert step.options.precision is torch.bfloat16
    assert step.options.scaler is None
