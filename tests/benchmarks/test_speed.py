"""The benchmark scripts measure what they say."""

from __future__ import annotations

import pytest
import torch
from contestants import NUM_CLASSES, build, make_samples, metafcos, metafcos_other_layout
from evaluation_speed import draw, ours, theirs
from training_speed import Runner


def test_both_evaluators_are_given_the_same(tmp_path):
    dataset, results = draw(30, tmp_path)
    assert len(results) == 30 * 100
    mine = ours(dataset, results, tmp_path / "mine.json")
    assert mine == theirs(dataset, results, tmp_path / "theirs.json")
    assert (tmp_path / "mine.json").read_text() == (tmp_path / "theirs.json").read_text()
    assert 5 < mine[0] < 60


@pytest.mark.parametrize("name", ["MetaFCOS, the recipe", "torchvision fcos_resnet50_fpn"])
def test_contestants_train_alike(name):
    contestant = build(name, torch.device("cpu"))
    samples = make_samples(2, 64, 64)
    losses = contestant.losses(contestant.model, contestant.prepare(samples))
    assert len(losses) == 3
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = {n for n, p in contestant.model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in contestant.model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if "layer1" in n or "res2" in n}
    assert any("layer2" in n or "res3" in n for n in trained)
    assert not any("bn" in n or "norm.weight" in n for n in trained)  # frozen: no parameters
    shapes = [tuple(p.shape) for n, p in contestant.model.named_parameters() if "cls_logits" in n]
    assert shapes[0][0] - NUM_CLASSES in (0, 1)
    before = [p.clone() for p in contestant.model.parameters()]
    wall, cpu = Runner(contestant, samples, None)()
    assert wall > 0
    assert cpu > 0
    for parameter, value in zip(contestant.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(("kind", "trains_with_channels_last"), [("cpu", True), ("cuda", False)])
def test_both_layouts_of_a_device_are_measured(kind, trains_with_channels_last):
    device = torch.device(kind)
    for builder, expected in (
        (metafcos, trains_with_channels_last),
        (metafcos_other_layout, not trains_with_channels_last),
    ):
        convolutions = [p for p in builder(device).model.parameters() if p.dim() == 4]
        large = [p for p in convolutions if min(p.shape) > 1]  # one-pixel kernels are both
        found = {p.is_contiguous(memory_format=torch.channels_last) for p in large}
        assert found == {expected}
