from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from meta_fcos.fpn import FPN
from meta_fcos.resnet import ResNet

STAGES = ("res2", "res3", "res4", "res5")


def from_torchvision(name):
    name = name.replace("bn1", "conv1.norm") if name.startswith("bn1") else name
    if name.startswith("conv1"):
        return f"stem.{name}"
    layer, block, rest = name.split(".", 2)
    rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for number in "123":
        rest = rest.replace(f"bn{number}", f"conv{number}.norm")
    return f"res{int(layer[-1]) + 1}.{block}.{rest}"


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_computes_torchvisions_with_the_stride_where_that_has_it(depth, norm):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None).double().eval()
    del reference.fc
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    width = 256 if depth == 50 else 64
    ours = ResNet(depth, STAGES, norm=norm, res2_channels=width, stride_in_1x1=False)
    state = {from_torchvision(name): value for name, value in reference.state_dict().items()}
    if norm == "FrozenBN":
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    ours.double().eval().load_state_dict(state)

    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = ours(x)
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for number, name in enumerate(STAGES, start=1):
            x = getattr(reference, f"layer{number}")(x)
            torch.testing.assert_close(features[name], x, rtol=1e-9, atol=1e-9)


def test_caffe_style_stride_sits_in_the_first_convolution():
    model = ResNet(50, res2_channels=32, width=8, stem_channels=8, stride_in_1x1=True)
    for stage in ("res3", "res4", "res5"):
        block = getattr(model, stage)[0]
        assert block.conv1.stride == block.shortcut.stride == (2, 2)
        assert block.conv2.stride == (1, 1)


@pytest.mark.parametrize("depth", [34, 101])
def test_other_depths_have_their_blocks(depth):
    model = ResNet(depth, STAGES, res2_channels=8, width=2, stem_channels=4)
    blocks = [len(getattr(model, stage)) for stage in STAGES]
    assert blocks == {34: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]
    assert list(model(torch.randn(1, 3, 32, 32))) == list(STAGES)
    assert model.out_channels == {"res2": 8, "res3": 16, "res4": 32, "res5": 64}


def test_stages_that_nobody_reads_are_not_built():
    names = [name for name, _ in ResNet(18, ["res3"], res2_channels=8).named_children()]
    assert names == ["stem", "res2", "res3"]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_freeze_at_fixes_the_first_stages(norm):
    model = ResNet(18, norm=norm, stem_channels=32, res2_channels=32, freeze_at=2)
    fixed = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert fixed == {"stem", "res2"}
    assert learning == {"res3", "res4", "res5"}
    # A batch norm that is frozen does not move its statistics either.
    kinds = {"FrozenBN": FrozenBatchNorm2d, "BN": FrozenBatchNorm2d, "GN": nn.GroupNorm}
    assert isinstance(model.res2[0].conv1.norm, kinds[norm])


def test_a_frozen_batch_norm_keeps_its_statistics():
    model = ResNet(18, norm="BN", stem_channels=8, res2_channels=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -1, 1)
    frozen = ResNet(18, norm="BN", stem_channels=8, res2_channels=8, freeze_at=5)
    frozen.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(frozen.train()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_fresh_frozen_batch_norms_change_nothing():
    model = ResNet(18, norm="FrozenBN", stem_channels=8, res2_channels=8).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plain = nn.functional.conv2d(x, model.stem.conv1.weight, stride=2, padding=3)
    torch.testing.assert_close(model.stem.conv1(x), plain, rtol=1e-6, atol=1e-7)


def test_group_norm_keeps_random_weights_in_bounds():
    torch.manual_seed(0)
    model = ResNet(50, STAGES, norm="GN", stem_channels=32, res2_channels=64, width=32)
    features = model(100 * torch.randn(2, 3, 64, 64))
    assert all(0.3 < feature.std() < 10 for feature in features.values())


def test_fpn_computes_torchvisions():
    torch.manual_seed(0)
    ours = FPN(ResNet(18, norm="GN", stem_channels=32, res2_channels=32), channels=32).double()
    channels = [64, 128, 256]
    top = LastLevelP6P7(32, 32)
    top.use_P5 = True
    reference = FeaturePyramidNetwork(channels, 32, extra_blocks=top).double()
    for index, number in enumerate((3, 4, 5)):
        for kind, blocks in (
            ("lateral", reference.inner_blocks),
            ("output", reference.layer_blocks),
        ):
            mine = getattr(ours, f"fpn_{kind}{number}")
            nn.init.normal_(mine.bias)
            blocks[index][0].load_state_dict(mine.state_dict())
    top.load_state_dict(ours.top_block.state_dict())

    images = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    levels = ours(images)
    expected = reference(OrderedDict(ours.bottom_up(images)))
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
    for level, other in zip(levels.values(), expected.values(), strict=True):
        torch.testing.assert_close(level, other)


def test_fpn_can_average():
    torch.manual_seed(0)
    bottom_up = ResNet(18, norm="GN", stem_channels=32, res2_channels=32)
    summed = FPN(bottom_up, channels=32, top_levels=0)
    averaged = FPN(bottom_up, channels=32, fuse="avg", top_levels=0)
    averaged.load_state_dict(summed.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert list(summed(images)) == ["p3", "p4", "p5"]
    stages = bottom_up(images)
    p5 = averaged.fpn_lateral5(stages["res5"])
    p4 = (
        averaged.fpn_lateral4(stages["res4"]) + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)
    ) / 2
    torch.testing.assert_close(averaged(images)["p4"], averaged.fpn_output4(p4))


@pytest.mark.parametrize("norm", ["GN", "BN", "FrozenBN"])
def test_fpn_with_norm_has_no_bias(norm):
    fpn = FPN(ResNet(18, stem_channels=8, res2_channels=8), channels=32, norm=norm)
    assert fpn.fpn_output3.bias is None
    assert fpn.fpn_output3.norm is not None
    fpn(torch.randn(2, 3, 64, 64))["p7"].sum().backward()
    assert fpn.fpn_lateral5.weight.grad is not None
