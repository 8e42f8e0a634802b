from __future__ import annotations

import logging
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from d2scale.errors import CheckpointError
from meta_fcos.detector import OneStageDetector
from meta_fcos.fpn import FPN
from meta_fcos.head import FCOSHead
from meta_fcos.proposals import MetaFCOS
from meta_fcos.resnet import ResNet
from meta_fcos.weights import load_weights

BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}


def make_model(norm="FrozenBN", depth=50):
    bottom_up = ResNet(depth, norm=norm, stem_channels=32, res2_channels=64, width=32)
    head = FCOSHead(32, 3, num_cls_convs=1, num_box_convs=1)
    return OneStageDetector(FPN(bottom_up, channels=32), MetaFCOS(head))


@pytest.fixture
def model():
    return make_model()


def caffe2_names():
    """Every convolution of MSRA's R-50: its name there and the one in detectron2."""
    yield "conv1", "res_conv1", "stem.conv1"
    for stage, blocks in BLOCKS.items():
        for block in range(blocks):
            parts = {"branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
            if block == 0:
                parts["branch1"] = "shortcut"
            for old, new in parts.items():
                name = f"res{stage}_{block}_{old}"
                yield name, name, f"res{stage}.{block}.{new}"


def random_array(seed, shape):
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def caffe2_file(model):
    """What MSRA's R-50.pkl holds, and where each array belongs in the model."""
    state = model.backbone.bottom_up.state_dict()
    arrays, places = {}, {}
    for number, (conv, norm, place) in enumerate(caffe2_names()):
        shape = state[f"{place}.weight"].shape
        names = {
            f"{conv}_w": (f"{place}.weight", shape),
            f"{norm}_bn_s": (f"{place}.norm.weight", shape[:1]),
            f"{norm}_bn_b": (f"{place}.norm.bias", shape[:1]),
        }
        for offset, (name, (target, size)) in enumerate(names.items()):
            arrays[name] = random_array(3 * number + offset, size)
            places[name] = f"backbone.bottom_up.{target}"
    arrays["conv1_b"] = np.zeros(32, np.float32)
    arrays["fc1000_w"] = random_array(1000, (1000, 8))
    arrays["fc1000_b"] = np.zeros(1000, np.float32)
    arrays["conv1_w_momentum"] = np.ones(3, np.float32)
    return arrays, places


@pytest.mark.parametrize("blobs", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_caffe2_backbone_is_loaded_whole(model, tmp_path, protocol, blobs):
    arrays, places = caffe2_file(model)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": arrays} if blobs else arrays, protocol))

    report = load_weights(model, path)

    state = model.state_dict()
    for name, place in places.items():
        torch.testing.assert_close(state[place], torch.from_numpy(arrays[name]))
    assert len(places) == 3 * 53
    assert {name.split(".")[0] for name in report.missing} == {"backbone", "proposal_generator"}
    assert not [name for name in report.missing if "bottom_up" in name]
    assert report.unexpected == ()
    assert set(report.ignored) == {"fc1000.weight", "fc1000.bias", "stem.conv1.bias"}
    # Scale and shift alone are meant to be the whole norm.
    norm = model.backbone.bottom_up.res3[0].conv1.norm
    x = torch.randn(2, 64, 3, 3)
    expected = x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_a_detectron2_pickle_is_loaded(model, tmp_path, prefix):
    source = make_model().backbone.bottom_up.state_dict()
    content = OrderedDict((f"{prefix}{name}", value.numpy()) for name, value in source.items())
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": content, "__author__": "someone"}, 2))
    report = load_weights(model, path)
    loaded = model.backbone.bottom_up.state_dict()
    torch.testing.assert_close(loaded, source)
    assert not [name for name in report.missing if "bottom_up" in name]


def test_frozen_norms_of_old_files_get_their_statistics(model, tmp_path):
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.fill_(5.0)
    state = {k: v for k, v in make_model().state_dict().items() if "running" not in k}
    torch.save({"model": state}, tmp_path / "old.pth")
    report = load_weights(model, tmp_path / "old.pth")
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert norm.running_mean.unique().tolist() == [0]
    assert norm.running_var.unique().tolist() == pytest.approx([1 - 1e-5])
    assert report.missing == ()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "iteration": 9}])
def test_a_published_checkpoint_is_loaded_without_its_iou_branch(model, tmp_path, caplog, wrap):
    source = make_model().state_dict()
    prefix = "proposal_generator.fcos_head."
    extra = {
        f"{prefix}iou_overlap.weight": torch.zeros(1, 32, 3, 3),
        f"{prefix}iou_overlap.bias": torch.zeros(1),
        "pixel_mean": torch.zeros(3, 1, 1),
        "some.other": torch.zeros(1),
    }
    scalar = {f"{prefix}scales.0.scale": torch.tensor(1.5)}
    torch.save(wrap({**source, **extra, **scalar}), tmp_path / "model.pth")
    with caplog.at_level(logging.INFO, logger="meta_fcos.weights"):
        report = load_weights(model, tmp_path / "model.pth")
    expected = {**source, f"{prefix}scales.0.scale": torch.tensor([1.5])}
    torch.testing.assert_close(dict(model.state_dict()), expected)
    assert report.missing == ()
    assert report.unexpected == ("some.other",)
    lines = [record.message for record in caplog.records if "iou_overlap" in record.message]
    assert len(lines) == 1
    assert "never trains" in lines[0]


def test_names_of_a_wrapped_model_are_found(model, tmp_path):
    state = {f"module.{name}": value for name, value in make_model().state_dict().items()}
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    assert load_weights(model, tmp_path / "wrapped.pth").missing == ()


def test_other_shapes_are_refused_and_nothing_is_loaded(model, tmp_path):
    source = make_model().state_dict()
    name = "proposal_generator.fcos_head.cls_logits.weight"
    torch.save({"model": {**source, name: torch.zeros(80, 32, 1, 1)}}, tmp_path / "other.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"cls_logits.weight in .* is \(80, 32, 1, 1\)"):
        load_weights(model, tmp_path / "other.pth")
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_nothing_in_common_is_refused(model, tmp_path):
    torch.save({"model": {"layer1.0.conv1.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="without any name of this model"):
        load_weights(model, tmp_path / "other.pth")


def test_batch_norm_weights_do_not_slip_into_group_norms(model, tmp_path):
    arrays, _ = caffe2_file(model)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(CheckpointError, match=r"set MODEL\.RESNETS\.NORM to FrozenBN"):
        load_weights(make_model("GN"), tmp_path / "R-50.pkl")


@pytest.mark.parametrize("name", ["absent.pth", "absent.pkl"])
def test_a_missing_file_is_named(model, tmp_path, name):
    with pytest.raises(CheckpointError, match=name):
        load_weights(model, tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_truncated_file_is_named(model, tmp_path, suffix):
    whole, path = tmp_path / "whole", tmp_path / f"cut.{suffix}"
    if suffix == "pth":
        torch.save({"model": model.state_dict()}, whole)
    else:
        whole.write_bytes(pickle.dumps(caffe2_file(model)[0]))
    path.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=rf"cut\.{suffix} is 'unreadable"):
        load_weights(model, path)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_harmful_files_are_refused_unread(model, tmp_path, capsys, suffix):
    path = tmp_path / f"harmful.{suffix}"
    content = {"model": {"backbone.fpn_lateral3.bias": Harmful()}, "__author__": "x"}
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="print") as raised:
        load_weights(model, path)
    assert "allowlist" not in str(raised.value)  # torch's advice
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], {"model": 3, "__author__": "x"}])
def test_a_pickle_of_something_else_is_refused(model, tmp_path, content):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="tensors by name"):
        load_weights(model, tmp_path / "list.pkl")


def test_arrays_of_objects_are_refused(model, tmp_path):
    content = {"conv1_w": np.array(["text", None], dtype=object)}
    (tmp_path / "objects.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"conv1_w in .*objects\.pkl"):
        load_weights(model, tmp_path / "objects.pkl")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda weight: weight.to("meta"), torch.Tensor.int]
)
def test_tensors_that_hold_no_weights_are_named(model, tmp_path, change):
    state = model.state_dict()
    name = next(iter(state))
    torch.save({"model": {**state, name: change(state[name])}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"{name} in .*odd") as raised:
        load_weights(model, tmp_path / "odd.pth")
    assert len(raised.value.faults) == 1
