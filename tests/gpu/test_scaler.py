"""float16's scaler on a device: a first step that overflows, and growth afterwards."""

from __future__ import annotations

import pytest
import torch

from d2scale.engine.step import build_step
from devices import on_both_devices
from small_detector import detector_samples, small_cfg, small_detector

ADAMW = ("SOLVER.OPTIMIZER", "ADAMW")


@pytest.fixture
def uninitialised_memory_is_nan(monkeypatch):
    """Let torch.empty show itself, as a busy device would."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_both_devices
@pytest.mark.filterwarnings("ignore::UserWarning")  # of operations without a deterministic form
@pytest.mark.parametrize("changes", [(), ADAMW], ids=["SGD", "AdamW"])
def test_a_first_step_that_overflows_leaves_no_trace(device, changes, uninitialised_memory_is_nan):
    def train(overflows):
        model = small_detector(device, torch.float32)
        amp = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16")
        step = build_step(small_cfg(device, *amp, *changes), model, ims_per_gpu=2)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
        options = step.options.__class__(precision=torch.float16, scaler=scaler)
        step = type(step)(model, step.optimizer, ims_per_gpu=2, options=options)

        def overflow(_):
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))

        if overflows:
            before = [p.detach().clone() for p in model.parameters()]
            step(detector_samples(2, side=64), overflow)
            for parameter, value in zip(model.parameters(), before, strict=True):
                assert torch.equal(parameter, value)
            scaler.update(2.0**8)
        step(detector_samples(2, side=64))
        return [p.detach().cpu() for p in model.parameters()]

    for found, expected in zip(train(True), train(False), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
