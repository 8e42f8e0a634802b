"""A split of a step changes nothing on a device: gradients and weights in double precision."""

from __future__ import annotations

import pytest
import torch

from d2scale.engine.step import build_step
from devices import on_both_devices
from small_detector import detector_samples, distance, gradients, small_cfg, small_detector


def weights_after(device, ims_per_gpu, on_oom, steps=2):
    cfg = small_cfg(device, "D2SCALE.ON_OOM", on_oom)
    model = small_detector(device, torch.float64)
    step = build_step(cfg, model, ims_per_gpu=ims_per_gpu)
    found = {}
    for _ in range(steps):
        losses = step(detector_samples(4), lambda _: found.update(gradients(model)))
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return found, weights, losses.losses


@on_both_devices
@pytest.mark.parametrize("on_oom", ["split", "raise"])
def test_micro_batches_train_as_the_whole_batch(device, on_oom, record_property):
    whole_gradients, whole, losses = weights_after(device, 4, "raise")
    for ims_per_gpu in (1, 2):
        found_gradients, found, found_losses = weights_after(device, ims_per_gpu, on_oom)
        errors = distance(found_gradients, whole_gradients), distance(found, whole)
        record_property(f"relative errors with {ims_per_gpu}", f"{errors[0]:.2g}, {errors[1]:.2g}")
        assert max(errors) < 1e-10
        assert found_losses == pytest.approx(losses, rel=1e-10)
