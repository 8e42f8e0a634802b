"""The numbers of the published head, rebuilt from their seeds (facts of its arithmetic)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from devices import on_both_devices, tf32
from meta_fcos.head import FCOSHead
from meta_fcos.proposals import MetaFCOS

CASES = json.loads(Path(__file__).with_name("parity.json").read_text())
STRIDES = (8, 16, 32, 64, 128)


def rebuild_weight(name, shape):
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(".scale"):
        return np.full(shape, 1 + 0.1 * random.rand())
    if len(shape) == 4:
        return 0.02 * random.standard_normal(shape)
    if name.endswith("cls_logits.bias"):
        return np.full(shape, -2.0)
    return 0.1 * random.standard_normal(shape) + (1 if name.endswith(".weight") else 0)


def rebuild_model(case):
    kernel = 3 if case["name"] == "kernel3_80cls" else 1
    model = MetaFCOS(FCOSHead(256, case["classes"], 5, cls_logits_kernel=kernel)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(rebuild_weight(name, tuple(parameter.shape))))
    return model


def rebuild_inputs(case, device):
    random = np.random.RandomState(case["seed"])
    height, width = case["padded"]
    features = [
        torch.from_numpy(random.standard_normal((len(case["sizes"]), 256, height // s, width // s)))
        .to(device)
        .requires_grad_()
        for s in STRIDES
    ]
    boxes, classes = [], []
    for (h, w), n in zip(case["sizes"], case["nobj"], strict=True):
        x0, y0 = random.rand(n) * w * 0.7, random.rand(n) * h * 0.7
        box_width = (0.05 + 0.9 * random.rand(n)) * (w - x0)
        box_height = (0.05 + 0.9 * random.rand(n)) * (h - y0)
        sides = np.stack((x0, y0, x0 + box_width, y0 + box_height), axis=1)
        boxes.append(torch.from_numpy(sides))
        classes.append(torch.from_numpy(random.randint(0, case["classes"], n)))
    return features, boxes, classes


@on_both_devices
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_losses_gradients_and_detections_are_the_published_heads(case, device):
    model = rebuild_model(case).to(device)
    features, boxes, classes = rebuild_inputs(case, device)

    losses = model(features, model.assign(boxes, classes, case["padded"]))
    sum(losses.values()).backward()

    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        case["losses"], rel=1e-5
    )
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name].grad.norm().item() for name in case["grad_norm"]}
    assert norms == pytest.approx(case["grad_norm"], rel=1e-4)
    feature_norms = [feature.grad.norm().item() for feature in features]
    assert feature_norms == pytest.approx(list(case["feature_grad_norm"].values()), rel=1e-4)

    with torch.no_grad(), tf32(False):
        found = model.float()([feature.float() for feature in features])
    for image, expected in zip(found, case["detections"], strict=True):
        image = {name: value.cpu() for name, value in image.items()}
        shown = len(expected["scores"])
        assert len(image["scores"]) == expected["n"]
        boxes = torch.tensor(expected["boxes"])
        torch.testing.assert_close(image["boxes"][:shown], boxes, atol=1e-3, rtol=0)
        scores = torch.tensor(expected["scores"])
        torch.testing.assert_close(image["scores"][:shown], scores, atol=1e-5, rtol=0)
        assert image["classes"][:shown].tolist() == expected["classes"]
