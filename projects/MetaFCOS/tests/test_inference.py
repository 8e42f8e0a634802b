from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from meta_fcos.head import HeadOutputs
from meta_fcos.inference import InferenceRule, rescale


def random_outputs(seed=0, classes=3, images=2):
    generator = torch.Generator().manual_seed(seed)

    def draw(channels, scale):
        shapes = ((6, 8), (3, 4))
        return [scale * torch.randn(images, channels, *s, generator=generator) for s in shapes]

    distances = [d.abs() for d in draw(4, 2)]
    return HeadOutputs(draw(classes, 2), distances, draw(1, 1))


def slow_detections(rule, outputs, image):
    """The definition, score by score."""
    found = []
    for logits, distances, centerness, stride in zip(*outputs, rule.strides, strict=True):
        level = []
        for label, row, column in torch.cartesian_prod(*map(torch.arange, logits.shape[1:])):
            score = logits[image, label, row, column].sigmoid()
            joint = score * centerness[image, 0, row, column].sigmoid()
            passing = joint if rule.threshold_with_centerness else score
            if passing <= rule.score_threshold:
                continue
            x, y = stride * column + stride / 2, stride * row + stride / 2
            left, top, right, bottom = stride * distances[image, :, row, column]
            box = torch.stack((x - left, y - top, x + right, y + bottom))
            level.append((joint.sqrt().item(), int(label), box))
        found += sorted(level, key=lambda d: -d[0])[: rule.per_level]
    kept = []
    for score, label, box in sorted(found, key=lambda d: -d[0]):
        rivals = [other for _, rival, other in kept if rival == label]
        if not rivals or box_iou(box[None], torch.stack(rivals)).max() <= rule.nms_iou:
            kept.append((score, label, box))
    return kept[: rule.per_image]


@pytest.mark.parametrize("with_centerness", [False, True])
@pytest.mark.parametrize(("per_level", "per_image"), [(1000, 100), (9, 100), (1000, 5)])
def test_detections_follow_the_definition(with_centerness, per_level, per_image):
    rule = InferenceRule((8, 16), 0.3, with_centerness, per_level, 0.4, per_image)
    outputs = random_outputs()
    for image, found in enumerate(rule(outputs)):
        expected = slow_detections(rule, outputs, image)
        assert len(expected) > 4
        assert found["classes"].tolist() == [label for _, label, _ in expected]
        assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected])
        torch.testing.assert_close(found["boxes"], torch.stack([box for _, _, box in expected]))


def test_nothing_above_the_threshold_is_an_empty_result():
    found = InferenceRule((8, 16), score_threshold=0.999999)(random_outputs())
    for image in found:
        assert image["boxes"].shape == (0, 4)
        assert image["scores"].shape == image["classes"].shape == (0,)
        assert image["classes"].dtype == torch.int64
        assert rescale(image, (48, 64), (96, 128))["boxes"].shape == (0, 4)


def test_rescale_maps_to_the_original_clips_and_drops_empty_boxes():
    detections = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0], [-5.0, 50.0, 300.0, 500.0],
                               [210.0, 10.0, 220.0, 20.0], [5.0, 5.0, 5.0, 9.0]]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
        "classes": torch.tensor([0, 1, 2, 3]),
    }  # fmt: skip
    found = rescale(detections, (100, 200), (50, 400))
    assert found["boxes"].tolist() == [[20, 10, 60, 20], [0, 25, 400, 50]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert found["classes"].tolist() == [0, 1]
