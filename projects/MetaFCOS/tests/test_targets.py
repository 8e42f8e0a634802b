from __future__ import annotations

import math

import pytest
import torch

from meta_fcos.targets import TargetRule, level_shapes, locate

STRIDES = (8, 16, 32, 64, 128)


def slow_targets(rule, boxes, classes, shapes):
    """The definition, location by location and box by box."""
    bounds = [-1, *rule.sizes_of_interest, math.inf]
    found = []
    for level, ((height, width), stride) in enumerate(zip(shapes, rule.strides, strict=True)):
        for row in range(height):
            for column in range(width):
                x, y = stride * column + stride / 2, stride * row + stride / 2
                best = None
                for (x0, y0, x1, y1), label in zip(boxes, classes, strict=True):
                    sides = (x - x0, y - y0, x1 - x, y1 - y)
                    near = all(side > 0 for side in sides)
                    if rule.center_sample:
                        reach = rule.radius * stride
                        near = near and abs(x - (x0 + x1) / 2) < reach
                        near = near and abs(y - (y0 + y1) / 2) < reach
                    area = (x1 - x0) * (y1 - y0)
                    fits = bounds[level] <= max(sides) <= bounds[level + 1]
                    if near and fits and (best is None or area < best[0]):
                        best = (area, label, [side / stride for side in sides])
                found.append(best)
    return found


@pytest.mark.parametrize("center_sample", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_targets_follow_the_definition(center_sample, seed):
    rule = TargetRule(center_sample=center_sample)
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(9, 2, dtype=torch.float64, generator=generator) * 400
    side = torch.rand(9, 2, dtype=torch.float64, generator=generator) ** 2 * (512 - corner)
    boxes = torch.cat((corner, corner + side), dim=1)
    classes = torch.arange(9)
    shapes = level_shapes((512, 480), STRIDES)

    targets = rule.assign([boxes], [classes], shapes, torch.float64)

    expected = slow_targets(rule, boxes.tolist(), classes.tolist(), shapes)
    assert targets.labels[0].tolist() == [-1 if e is None else e[1] for e in expected]
    assert targets.positive.sum() > 20
    for index, best in enumerate(expected):
        if best is None:
            assert targets.centerness[0, index] == 0
            continue
        assert targets.distances[0, :, index].tolist() == pytest.approx(best[2])
        left, top, right, bottom = best[2]
        ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        assert targets.centerness[0, index].item() == pytest.approx(math.sqrt(ratio))


def test_a_location_on_the_border_of_the_centre_region_is_background():
    # The centre is (24, 24) and the radius 12 pixels: 12 and 36 lie on the border.
    rule = TargetRule(strides=(8,), sizes_of_interest=(), radius=1.5)
    box = torch.tensor([[0.0, 0.0, 48.0, 48.0]])
    labels = rule.assign([box], [torch.tensor([0])], [(6, 6)], torch.float32).labels
    assert labels.view(6, 6).tolist() == [
        [0 if 2 <= row <= 3 and 2 <= column <= 3 else -1 for column in range(6)] for row in range(6)
    ]


def test_size_ranges_are_closed_on_both_ends():
    # From the centre of the cell at (32, 32), the farthest side is exactly 64 pixels away.
    box = torch.tensor([[-32.0, 0.0, 96.0, 64.0]])
    rule = TargetRule(strides=(64, 64), sizes_of_interest=(64,))
    labels = rule.assign([box], [torch.tensor([4])], [(1, 1), (1, 1)], torch.float32).labels
    assert labels.tolist() == [[4, 4]]


def test_images_without_boxes_are_background():
    shapes = level_shapes((64, 96), STRIDES)
    targets = TargetRule().assign(
        [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], shapes, torch.float32
    )
    assert not targets.positive.any()
    assert {name: total.item() for name, total in targets.sums().items()} == {
        "num_positives": 0,
        "centerness_sum": 0,
    }


@pytest.mark.parametrize("center_sample", [True, False])
def test_images_together_have_the_targets_that_each_has_alone(make_sample, center_sample):
    samples = [make_sample(96, 128, count=count, seed=count) for count in (5, 0, 30, 1)]
    rule, shapes = TargetRule(center_sample=center_sample), level_shapes((96, 128), STRIDES)

    def assign(some):
        boxes, classes = zip(*((s["boxes"], s["classes"]) for s in some), strict=True)
        return rule.assign(boxes, classes, shapes, torch.float32)

    together, alone = assign(samples), [assign([sample]) for sample in samples]
    for part in range(3):
        assert torch.equal(together[part], torch.cat([targets[part] for targets in alone]))


def test_sums_do_not_depend_on_the_padding(make_sample):
    sample = make_sample(height=90, width=120)
    sums = [
        TargetRule()
        .assign([sample["boxes"]], [sample["classes"]], level_shapes(size, STRIDES), torch.float32)
        .sums()
        for size in ((96, 128), (256, 192))
    ]
    assert sums[0]["num_positives"] > 0
    assert sums[0]["num_positives"] == sums[1]["num_positives"]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)


def test_locations_sit_in_the_middle_of_their_cells():
    locations = locate([(1, 2), (1, 1)], [8, 16], dtype=torch.float32, device=torch.device("cpu"))
    assert locations.x.tolist() == [4, 12, 8]
    assert locations.y.tolist() == [4, 4, 8]
    assert locations.stride.tolist() == [8, 8, 16]


def test_coarse_levels_are_rounded_up():
    assert level_shapes((96, 160), STRIDES) == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def test_one_border_for_every_two_levels():
    with pytest.raises(ValueError, match="4 sizes of interest for 3 levels"):
        TargetRule(strides=(8, 16, 32))
