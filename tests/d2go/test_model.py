"""MetaFCOS on detectron2's backbone is the MetaFCOS of the default engine."""

import numpy as np
import pytest
import torch

OPTIONS = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.FPN.OUT_CHANNELS", "64", "MODEL.FCOS.NUM_CLS_CONVS", "1"),
    *("MODEL.FCOS.NUM_CLASSES", "60"),
]


@pytest.fixture(scope="module")
def models():
    """The two detectors with the same weights: plain torch, and detectron2's backbone."""
    from d2go.modeling.api import build_d2go_model

    from d2scale.config import load_cfg
    from d2scale.d2go.runner import Runner
    from meta_fcos.detector import build_detector
    from meta_fcos.detectron2 import register

    register()
    url = "d2scale://MetaFCOS/Base-MetaFCOS.yaml"
    torch.manual_seed(0)
    ours = build_detector(load_cfg(url, OPTIONS))
    cfg = Runner.get_default_cfg()
    cfg.merge_from_file(url)
    cfg.merge_from_list(OPTIONS)
    theirs = build_d2go_model(cfg).model
    for buffers in ours.backbone.bottom_up.state_dict().items():
        if buffers[0].endswith(("running_var", "norm.weight")):
            buffers[1].uniform_(0.5, 0.9)  # as after training: activations stay small
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert [key for key in report.missing_keys if not key.startswith("pixel_")] == []
    return ours, theirs


def truth():
    random = np.random.RandomState(0)
    image = torch.from_numpy(random.randint(0, 256, (3, 96, 120), dtype=np.uint8))
    boxes = torch.tensor([[10.0, 10, 60, 70], [50, 20, 110, 90]])
    return image, boxes, torch.tensor([3, 41])


def test_the_same_weights_give_the_same_losses(models):
    from detectron2.structures import Boxes, Instances

    ours, theirs = models
    image, boxes, classes = truth()
    instances = Instances((96, 120), gt_boxes=Boxes(boxes), gt_classes=classes)
    expected = ours.train()([{"image": image, "boxes": boxes, "classes": classes}])
    found = theirs.train()([{"image": image, "instances": instances}])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_the_same_weights_give_the_same_detections(models):
    ours, theirs = models
    image, _, _ = truth()
    sample = {"image": image, "height": 192, "width": 240}
    rules = [m.proposal_generator for m in (ours, theirs)]
    for generator in rules:
        generator.fcos_head.cls_logits.bias.data.fill_(-1.0)
    with torch.no_grad():
        (expected,) = ours.eval()([sample])
        instances = theirs.eval()([sample])[0]["instances"]
    assert instances.image_size == (192, 240)
    assert len(instances) == len(expected["scores"]) > 0
    assert torch.allclose(instances.pred_boxes.tensor, expected["boxes"], atol=1e-3)
    assert torch.allclose(instances.scores, expected["scores"], atol=1e-5)
