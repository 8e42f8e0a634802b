"""Gradients and detections of a device against those of a CPU in double precision."""

from __future__ import annotations

import contextlib

import pytest
import torch

from devices import on_both_devices, tf32
from small_detector import detector_samples, distance, gradients, small_detector

# What a gradient may be off by, of all tensors together: some times the rounding of the format.
CASES = {
    "float64": (torch.float64, None, False, 1e-9),
    "float32": (torch.float32, None, False, 1e-3),
    "TF32": (torch.float32, None, True, 5e-2),
    "AMP float16": (torch.float32, torch.float16, False, 1e-1),
    "AMP bfloat16": (torch.float32, torch.bfloat16, False, 3e-1),
}


@pytest.fixture(scope="module")
def exact():
    model = small_detector("cpu", torch.float64)
    sum(model(detector_samples(4)).values()).backward()
    return gradients(model)


@on_both_devices
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_cpu_in_double_precision(device, case, exact, record_property):
    dtype, autocast, uses_tf32, allowed = CASES[case]
    model = small_detector(device, dtype)
    scale = 2.0**10 if autocast is torch.float16 else 1.0
    precision = torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext()
    with tf32(uses_tf32):
        with precision:
            loss = sum(
                loss.float() if autocast else loss for loss in model(detector_samples(4)).values()
            )
        (loss * scale).backward()
    found = {name: value / scale for name, value in gradients(model).items()}
    error = distance(found, exact)
    record_property("relative error", f"{error:.2g}")
    assert error < allowed


@on_both_devices
def test_detections_are_those_of_a_cpu(device):
    def detect(where):
        model = small_detector(where, torch.float64, "MODEL.FCOS.INFERENCE_TH_TEST", 0.005).eval()
        with torch.no_grad():
            return model(detector_samples(2))

    for found, expected in zip(detect(device), detect("cpu"), strict=True):
        assert len(expected["scores"]) > 10
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-6, atol=1e-6)
