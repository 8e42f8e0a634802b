from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from meta_fcos.head import HeadOutputs
from meta_fcos.losses import BOX_LOSSES, LossRule, finish_normalizers, focal_loss
from meta_fcos.targets import Targets


def random_logits(seed=0, classes=4, cells=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, classes, cells, dtype=torch.float64, generator=generator)
    labels = torch.randint(-1, classes, (2, cells), generator=generator)
    return logits.requires_grad_(), labels


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (0.5, 0.0)])
def test_focal_loss_equals_torchvisions_on_one_hot_targets(alpha, gamma):
    logits, labels = random_logits()
    one_hot = F.one_hot(labels + 1, 5)[..., 1:].permute(0, 2, 1).double()
    assert one_hot.sum() == (labels >= 0).sum() > 0
    expected = sigmoid_focal_loss(logits, one_hot, alpha, gamma, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, logits)

    loss = focal_loss(logits, labels, alpha, gamma)
    (gradient,) = torch.autograd.grad(loss, logits)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_focal_loss_keeps_one_tensor_of_the_logits_size():
    logits, labels = random_logits()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    ):
        focal_loss(logits, labels, 0.25, 2.0)
    assert kept == [logits.numel()]


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_focal_loss_is_finite_for_extreme_logits(value):
    logits = torch.full((1, 2, 1), value, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[1]]), 0.25, 2.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_box_losses_of_one_pair():
    # Intersection 2 * 2, union 4 + 6 - 4, hull 2 * 3; areas are padded by 1 in the IoU.
    predicted = torch.tensor([[1.0, 1.0, 1.0, 1.0]]).T[None]
    target = torch.tensor([[1.0, 1.0, 1.0, 2.0]]).T[None]
    iou = 5 / 7
    values = {name: loss(predicted, target).item() for name, loss in BOX_LOSSES.items()}
    assert values == pytest.approx(
        {"giou": 1 - iou, "linear_iou": 1 - iou, "iou": -math.log(iou)}, rel=1e-6
    )


def test_giou_punishes_the_hull():
    # Intersection 1 * 1, union 2 + 2 - 1, hull 2 * 2.
    predicted = torch.tensor([0.5, 0.5, 1.5, 0.5])[None, :, None]
    target = torch.tensor([0.5, 0.5, 0.5, 1.5])[None, :, None]
    expected = 1 - (2 / 4 - (4 - 3) / 4)
    assert BOX_LOSSES["giou"](predicted, target).item() == pytest.approx(expected)


def one_level(distances, labels):
    cells = labels.shape[1]
    outputs = HeadOutputs(
        [torch.zeros(1, 2, 1, cells, requires_grad=True)],
        [distances.view(1, 4, 1, cells)],
        [torch.zeros(1, 1, 1, cells, requires_grad=True)],
    )
    positive = labels >= 0
    targets = Targets(labels, torch.ones(1, 4, cells), positive.float())
    return outputs, targets


def test_losses_are_divided_by_their_normalizers():
    outputs, targets = one_level(torch.full((4, 2), 2.0), torch.tensor([[1, -1]]))
    once = LossRule()(outputs, targets, finish_normalizers(targets.sums(), 1))
    normalizers = {"num_positives": torch.tensor(2.0), "centerness_sum": torch.tensor(8.0)}
    divided = LossRule()(outputs, targets, normalizers)
    factors = {name: (once[name] / divided[name]).item() for name in once}
    assert factors == {"loss_fcos_cls": 2, "loss_fcos_loc": 8, "loss_fcos_ctr": 2}


def test_infinite_distances_at_background_do_not_reach_the_loss():
    distances = torch.tensor([1.5, math.inf]).repeat(4, 1).requires_grad_()
    outputs, targets = one_level(distances, torch.tensor([[0, -1]]))
    losses = LossRule()(outputs, targets, finish_normalizers(targets.sums(), 1))
    sum(losses.values()).backward()
    assert torch.isfinite(losses["loss_fcos_loc"])
    assert distances.grad[:, 1].tolist() == [0, 0, 0, 0]
    assert (distances.grad[:, 0] != 0).all()


def test_normalizers_are_clamped_before_they_are_divided():
    totals = {
        "num_positives": torch.tensor(1.0, dtype=torch.float64),
        "centerness_sum": torch.tensor(0.0, dtype=torch.float64),
    }
    finished = finish_normalizers(totals, world_size=4)
    assert {name: value.item() for name, value in finished.items()} == {
        "num_positives": 0.25,
        "centerness_sum": 2.5e-7,
    }


def test_an_unknown_box_loss_is_refused():
    with pytest.raises(ValueError, match="giou, linear_iou, iou"):
        LossRule(box_loss="l1")
