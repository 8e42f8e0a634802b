"""A device's memory: limited, measured, and filled by steps that fit."""

from __future__ import annotations

import pytest
import torch

from d2scale.engine.memory import workload_of
from d2scale.memory.predict import predict
from d2scale.memory.probe import Probe
from d2scale.memory.worst_case import WorstCase
from d2scale.planning.gpu_assumptions import context_bytes
from d2scale.step.out_of_memory import OutOfMemoryError
from devices import memory_of, on_both_devices
from small_detector import small_cfg

MIB = 2**20


@on_both_devices
def test_a_limit_holds_and_is_lifted(device):
    memory = memory_of(device)
    held = torch.zeros(MIB, device=memory.device)
    with memory.limited(64 * MIB, [held]):
        inside = torch.zeros(32 * MIB, dtype=torch.uint8, device=memory.device)
        live, reserved = memory.peaks()
        with pytest.raises(OutOfMemoryError):
            torch.zeros(64 * MIB, dtype=torch.uint8, device=memory.device)
    assert live >= 36 * MIB
    assert reserved >= live
    del inside
    assert len(torch.zeros(64 * MIB, dtype=torch.uint8, device=memory.device)) == 64 * MIB


@on_both_devices
def test_a_measured_size_trains_and_is_near_its_prediction(device, record_property):
    memory = memory_of(device)
    side = 64 if device == "cpu" else 320
    workload = workload_of(small_cfg(device), WorstCase(((side, side),), 5, "a test"))
    prediction = predict(workload)
    profile = prediction.profile(workload, caching=memory.caches)
    step = workload.build_step(memory.device)
    context = 0 if device == "cpu" else context_bytes(torch.cuda.get_device_capability()[0])
    budget_bytes = context + profile.peak_bytes(6.5) - profile.context_bytes
    measured = Probe(memory, step, workload.trial_batches).measure(profile, budget_bytes)
    assert 4 <= measured.largest <= 9
    fitting = max((t for t in measured.trials if t.fits), key=lambda trial: trial.ims_per_gpu)
    images = fitting.ims_per_gpu
    wanted = prediction.reserved_bytes(images) if memory.caches else prediction.live_bytes(images)
    record_property("reserved over predicted", f"{fitting.reserved_bytes / wanted:.3f}")
    assert fitting.reserved_bytes == pytest.approx(wanted, rel=0.25)
