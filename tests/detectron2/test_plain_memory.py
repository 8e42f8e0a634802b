"""How much fits into a detectron2 training, counted with samples of the recipe's own mapper."""

import pickle

import pytest
import torch

from d2scale.errors import DataError

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "32",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(32,)",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "64",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "32",
    "INPUT.MIN_SIZE_TRAIN": "(160, 320)",
    "INPUT.MAX_SIZE_TRAIN": "500",
}
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC_FPN = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def memory_of(recipe, dataset, **settings):
    from d2scale.detectron2.config import load_cfg
    from d2scale.detectron2.plain_memory import PlainMemory

    settings = {**SMALL, "DATASETS.TRAIN": f"('{dataset}',)", **settings}
    path = f"detectron2://{recipe}"
    cfg = load_cfg(path, [word for pair in settings.items() for word in pair])
    return PlainMemory(cfg), cfg


def lazy_memory_of(recipe, dataset, *overrides):
    from d2scale.detectron2.lazy_config import load_lazy_config, read_lazy_recipe
    from d2scale.detectron2.plain_memory import LazyMemory

    lazy = load_lazy_config(
        f"detectron2://{recipe}",
        ["train.device=cpu", f"dataloader.train.dataset.names={dataset}", *overrides],
    )
    resize = lazy.dataloader.train.mapper.augmentations[0]
    resize.short_edge_length, resize.max_size = (160, 320), 500
    return LazyMemory(lazy, read_lazy_recipe(lazy)), read_lazy_recipe(lazy)[0]


def error_of(memory, cfg, images=4):
    """Return how far the prediction is off a counted step of ``images``, as a part of it."""
    from detectron2.utils.events import EventStorage
    from detectron2_memory import counted_bytes

    workload = memory.workload(cfg)
    torch.manual_seed(1)
    with EventStorage(1):
        counted = counted_bytes(workload.build_step(torch.device("cpu")), workload, images)
    predicted = memory.predicted(cfg)
    # The images, not the optimizer's copies, decide.
    lines = [line for group in predicted.stream.peak_lines().values() for line in group]
    assert max(lines, key=lambda line: line.at(images)).bytes_per_image > 2**20
    return abs(predicted.live_bytes(images) / counted - 1)


@pytest.mark.parametrize("recipe", [RETINANET, MASK_RCNN, KEYPOINT_RCNN, PANOPTIC_FPN])
def test_four_images_are_predicted_from_one_and_two(recipe, dataset):
    memory, cfg = memory_of(recipe, dataset)
    assert error_of(memory, cfg) < 0.02


def test_a_lazy_config_is_predicted_on_its_own_mapper(dataset):
    memory, cfg = lazy_memory_of("COCO-Detection/fcos_R_50_FPN_1x.py", dataset)
    assert memory.batches.size == (320, 427)
    assert memory.batches.smaller["image"].shape[-2:] == (256, 341)
    assert error_of(memory, cfg) < 0.02
    description = memory.workload(cfg).description
    assert "FCOS in detectron2, images of 320x427 pixels with 11" in description


def test_the_heads_see_as_many_proposals_on_instances_as_they_can_sample(dataset):
    from detectron2.utils.events import EventStorage

    memory, cfg = memory_of(KEYPOINT_RCNN, dataset)
    workload = memory.workload(cfg)
    step = workload.build_step(torch.device("cpu"))
    with EventStorage(1) as storage:
        step.model(workload.make_batch(2))
        latest = storage.latest()
    assert latest["roi_head/num_fg_samples"][0] == 16
    assert latest["roi_head/num_bg_samples"][0] == 48


def test_proposals_that_were_computed_before_come_with_the_samples(dataset, tmp_path):
    proposals = {
        "ids": [0, 1, 2, 3],
        "boxes": [torch.tensor([[0.0, 0.0, 50.0, 50.0]] * 30).numpy()] * 4,
        "objectness_logits": [torch.zeros(30).numpy()] * 4,
        "bbox_mode": 0,
    }
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(proposals))
    settings = {"DATASETS.PROPOSAL_FILES_TRAIN": f"('{path}',)"}
    memory, cfg = memory_of("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", dataset, **settings)
    assert len(memory.batches.batch(1)[0]["proposals"]) > 0
    # With fewer images the optimizer needs more than they do.
    assert error_of(memory, cfg, images=12) < 0.06


def test_a_dataset_that_is_not_there_is_one_line():
    memory, _ = memory_of(MASK_RCNN, "nowhere_2017_train")
    with pytest.raises(DataError, match=r"DATASETS\.TRAIN is 'nowhere_2017_train'") as raised:
        memory.profile()
    assert "\n" not in str(raised.value)


def test_the_method_that_fills_the_memory_finds_a_batch_for_both_kinds_of_recipe(dataset):
    from d2scale.detectron2.training import Scaling

    budget = {"D2SCALE.MEMORY.BUDGET_GIB": "2.0", "D2SCALE.MAX_IMS_PER_BATCH": "4"}
    _, cfg = memory_of(RETINANET, dataset, **budget)
    plan = Scaling(cfg, "max_memory").plan
    assert plan.ims_per_batch == plan.ims_per_gpu == 4
    assert 0 < plan.predicted_peak_gib <= 0.95 * 2
    overrides = ("+d2scale.memory.budget_gib=2.0", "+d2scale.max_ims_per_batch=4")
    memory, _ = lazy_memory_of("COCO-Detection/retinanet_R_50_FPN_1x.py", dataset, *overrides)
    plan = Scaling(memory._lazy, "max_memory").plan
    assert plan.ims_per_batch == plan.ims_per_gpu == 4
    assert 0 < plan.predicted_peak_gib <= 0.95 * 2


def test_the_memory_budget_binds_the_training(monkeypatch):
    from d2scale.detectron2 import memory

    held = []
    monkeypatch.setattr(memory, "hold_to_budget", lambda *arguments: held.append(arguments))
    on_cpu, cfg = memory_of(RETINANET, "none", **{"D2SCALE.MEMORY.BUDGET_GIB": "3.0"})
    on_cpu.hold_to_budget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cfg.MODEL.DEVICE = "cuda"
    on_cpu.hold_to_budget()
    assert held == [(torch.device("cuda", 1), 3.0)]
