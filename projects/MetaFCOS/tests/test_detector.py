from __future__ import annotations

import logging
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from d2scale.errors import ConfigError
from d2scale.step.micro_batches import ExactModel
from d2scale.step.model_state import ModelState
from meta_fcos.detector import OneStageDetector, build_detector, padded_size
from meta_fcos.fpn import FPN
from meta_fcos.head import FCOSHead
from meta_fcos.proposals import MetaFCOS
from meta_fcos.resnet import ResNet
from meta_fcos.targets import TargetRule

LOSSES = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}


def test_images_are_normalized_then_padded_with_zeros(make_detector, make_sample):
    model = make_detector()
    model.pixel_mean.copy_(torch.tensor([1.0, 2, 3]).view(3, 1, 1))
    model.pixel_std.fill_(2.0)
    samples = [make_sample(90, 70), make_sample(50, 100, seed=1)]
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    model(samples)

    assert seen[0].shape == (2, 3, 96, 128)
    expected = (samples[1]["image"].float() - torch.tensor([1.0, 2, 3]).view(3, 1, 1)) / 2
    torch.testing.assert_close(seen[0][1, :, :50, :100], expected)
    assert not seen[0][1, :, 50:].any()
    assert not seen[0][1, :, :, 100:].any()


@pytest.mark.parametrize(
    ("pad_to", "expected"), [(None, (64, 96)), ((65, 20), (96, 96)), ((33, 160), (64, 160))]
)
def test_padded_size(make_sample, pad_to, expected):
    more = {} if pad_to is None else {"pad_to": pad_to}
    assert padded_size([make_sample(33, 70), make_sample(64, 32, **more)]) == expected


@pytest.mark.parametrize("norm", ["GN", "FrozenBN", "BN"])
def test_every_learning_parameter_gets_a_gradient(make_detector, make_sample, norm):
    model = make_detector(norm=norm, freeze_at=2)
    losses = model([make_sample(seed=1), make_sample(seed=2)])
    assert losses.keys() == LOSSES
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2")):
            assert parameter.grad is None, name
        else:
            assert torch.isfinite(parameter.grad).all(), name


def test_a_batch_without_boxes_gives_zero_gradients_not_missing_ones(make_detector, make_sample):
    model = make_detector()
    losses = model([make_sample(count=0)])
    assert losses["loss_fcos_cls"] > 0
    assert losses["loss_fcos_loc"] == losses["loss_fcos_ctr"] == 0
    (losses["loss_fcos_loc"] + losses["loss_fcos_ctr"]).backward()
    box_part = [
        parameter
        for name, parameter in model.proposal_generator.fcos_head.named_parameters()
        if not name.startswith("cls")
    ]
    assert len(box_part) > 10
    assert all(parameter.grad is not None for parameter in box_part)
    assert not any(parameter.grad.any() for parameter in box_part)


def test_training_from_random_weights_lowers_the_loss(make_detector, make_sample):
    model = make_detector()
    samples = [make_sample(seed=1), make_sample(seed=2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    totals = []
    for _ in range(15):
        total = sum(model(samples).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert all(math.isfinite(total) for total in totals)


def test_autocast_stays_near_full_precision(make_detector, make_sample):
    model = make_detector(norm="FrozenBN")
    samples = [make_sample()]
    exact = model(samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(samples)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.01)
    assert model.backbone.bottom_up.stem.conv1.weight.grad.dtype == torch.float32


def test_detections_are_in_the_original_image(make_detector, make_sample):
    model = make_detector().eval()
    model.proposal_generator.fcos_head.cls_logits.bias.data.fill_(0)
    sample = make_sample(height=60, width=80)
    with torch.no_grad():
        (same,) = model([{**sample, "height": 60, "width": 80}])
        (larger,) = model([{**sample, "height": 120, "width": 240}])
    assert len(same["scores"]) > 10
    torch.testing.assert_close(larger["boxes"], same["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    assert same["boxes"].min() >= 0
    assert same["boxes"][:, 2].max() <= 80
    assert same["boxes"][:, 3].max() <= 60
    assert same["boxes"].dtype == same["scores"].dtype == torch.float32
    assert same["classes"].dtype == torch.int64
    assert (same["scores"].diff() <= 0).all()


def test_detection_needs_no_ground_truth(make_detector, make_sample):
    sample = make_sample()
    del sample["boxes"], sample["classes"]
    with torch.no_grad():
        assert len(make_detector().eval()([sample])) == 1


def test_pixel_statistics_are_not_saved(make_detector):
    assert not [name for name in make_detector().state_dict() if "pixel" in name]


def test_it_keeps_the_protocol_of_exact_micro_batches(make_detector):
    assert isinstance(make_detector(), ExactModel)


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_a_training_step_has_no_data_dependent_shapes(norm):
    """Under fake tensors there is no data at all, so any such shape would raise."""
    with FakeTensorMode():
        backbone = FPN(ResNet(50, norm=norm, freeze_at=2))
        model = OneStageDetector(backbone, MetaFCOS(FCOSHead(256, 60)))
        samples = [
            {
                "image": torch.zeros(3, 800, 1216, dtype=torch.uint8),
                "height": 480,
                "width": 640,
                "boxes": torch.rand(count, 4),
                "classes": torch.zeros(count, dtype=torch.int64),
            }
            for count in (7, 0)
        ]
        normalizers = model.finish_normalizers(model.loss_normalizers(samples), 2)
        for given in (None, normalizers):
            sum(model(samples, given).values()).backward()
        gradients = [p.grad is not None for p in model.parameters() if p.requires_grad]
        assert len(gradients) > 60
        assert all(gradients)


@pytest.fixture
def assigned(monkeypatch):
    """The number of images of every call that assigns targets."""
    counts, assign = [], TargetRule.assign

    def counted(rule, boxes, *arguments):
        counts.append(len(boxes))
        return assign(rule, boxes, *arguments)

    monkeypatch.setattr(TargetRule, "assign", counted)
    return counts


def test_a_step_assigns_its_targets_once(make_detector, make_sample, assigned):
    model = make_detector()
    batches = [[make_sample(seed=1), make_sample(seed=2)], [make_sample(seed=3)]]
    sums = [model.loss_normalizers(batch) for batch in batches]
    normalizers = model.finish_normalizers({k: sums[0][k] + sums[1][k] for k in sums[0]}, 1)
    losses = [model(batch, normalizers) for batch in batches]
    assert assigned == [2, 1]
    # Nothing is kept for another step, and the losses are those without normalizers before.
    torch.testing.assert_close(model(batches[0], normalizers), losses[0], rtol=0, atol=0)
    assert assigned == [2, 1, 2]


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_what_a_step_keeps_for_later_is_no_state_of_a_virtual_rank(
    make_detector, make_sample, norm
):
    model = make_detector(norm=norm)
    state = ModelState(model)
    before = state.fingerprint()
    samples = [make_sample(seed=1)]
    model.loss_normalizers(samples)
    model(samples)
    model.loss_normalizers(samples)
    assert state.fingerprint() == before


def test_targets_of_a_failed_step_do_not_stay(make_detector, make_sample):
    model = make_detector()
    samples = [make_sample(seed=seed) for seed in range(4)]
    for batch in (samples[:2], samples[2:]):
        model.loss_normalizers(batch)
    model.backbone.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(samples[:2])
    del model.backbone.forward
    for sample in samples:
        model.loss_normalizers([sample])
    assert len(model._targets_once._kept) == 4
    for sample in samples:
        model([sample])
    assert not model._targets_once._kept


def test_state_dict_has_the_published_names(recipe_cfg):
    names = build_detector(recipe_cfg).state_dict().keys()
    assert {
        "backbone.bottom_up.stem.conv1.norm.running_mean",
        "backbone.bottom_up.res2.0.shortcut.norm.weight",
        "backbone.bottom_up.res5.2.conv3.weight",
        "backbone.fpn_lateral3.bias",
        "backbone.fpn_output5.weight",
        "backbone.top_block.p6.weight",
        "backbone.top_block.p7.bias",
    } <= names
    head = {name for name in names if name.startswith("proposal_generator.")}
    towers = {
        f"{tower}.{index}.{kind}"
        for tower in ("cls_tower", "bbox_tower")
        for index in (0, 1, 3, 4, 6, 7, 9, 10)
        for kind in ("weight", "bias")
    }
    outputs = {
        f"{n}.{k}" for n in ("cls_logits", "bbox_pred", "ctrness") for k in ("weight", "bias")
    }
    scales = {f"scales.{level}.scale" for level in range(5)}
    expected = towers | outputs | scales
    assert head == {f"proposal_generator.fcos_head.{name}" for name in expected}


def test_the_config_reaches_the_model(small_cfg):
    cfg = small_cfg
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 1
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 2
    cfg.MODEL.FCOS.CLS_LOGITS_KERNEL_SIZE = 3
    cfg.MODEL.FCOS.USE_SCALE = False
    cfg.MODEL.FCOS.PRIOR_PROB = 0.1
    cfg.MODEL.FCOS.POS_RADIUS = 2.5
    cfg.MODEL.FCOS.CENTER_SAMPLE = False
    cfg.MODEL.FCOS.LOC_LOSS_TYPE = "iou"
    cfg.MODEL.FCOS.LOSS_ALPHA = 0.3
    cfg.MODEL.FCOS.LOSS_GAMMA = 1.5
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [8, 16, 32]
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.FCOS.FPN_STRIDES = [8, 16, 32, 64]
    cfg.MODEL.FCOS.TOP_LEVELS = 1
    cfg.MODEL.FCOS.THRESH_WITH_CTR = True
    cfg.MODEL.FCOS.INFERENCE_TH_TEST = 0.2
    cfg.MODEL.FCOS.PRE_NMS_TOPK_TEST = 10
    cfg.MODEL.FCOS.NMS_TH = 0.4
    cfg.MODEL.FCOS.POST_NMS_TOPK_TEST = 7
    cfg.MODEL.PIXEL_STD = [57.0, 58.0, 59.0]
    model = build_detector(cfg)

    generator = model.proposal_generator
    head = generator.fcos_head
    assert len(head.cls_tower) == 3
    assert len(head.bbox_tower) == 6
    assert head.cls_logits.kernel_size == (3, 3)
    assert head.cls_logits.out_channels == 3
    assert len(head.scales) == 0
    assert head.cls_logits.bias.sigmoid().mean().item() == pytest.approx(0.1)
    target, loss, inference = generator.target_rule, generator.loss_rule, generator.inference_rule
    assert (target.radius, target.center_sample) == (2.5, False)
    assert target.sizes_of_interest == (8, 16, 32)
    assert target.strides == inference.strides == (8, 16, 32, 64)
    assert (loss.focal_alpha, loss.focal_gamma, loss.box_loss) == (0.3, 1.5, "iou")
    assert (inference.score_threshold, inference.threshold_with_centerness) == (0.2, True)
    assert (inference.per_level, inference.nms_iou, inference.per_image) == (10, 0.4, 7)
    assert model.pixel_std.flatten().tolist() == [57, 58, 59]
    assert model.backbone.out_names == ("p3", "p4", "p5", "p6")


def test_a_wrong_config_builds_nothing(recipe_cfg):
    recipe_cfg.MODEL.FCOS.NORM = "BN"
    with pytest.raises(ConfigError, match=r"MODEL\.FCOS\.NORM"):
        build_detector(recipe_cfg)


@pytest.mark.parametrize(
    ("norm", "weights", "told"),
    [("FrozenBN", "", True), ("FrozenBN", "x", False), ("GN", "", False)],
)
def test_frozen_norms_without_weights_are_told(small_cfg, caplog, norm, weights, told):
    small_cfg.MODEL.RESNETS.NORM = norm
    small_cfg.MODEL.WEIGHTS = weights
    with caplog.at_level(logging.WARNING):
        build_detector(small_cfg)
    assert ("use GN" in caplog.text) == told
