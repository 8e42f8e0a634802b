from __future__ import annotations

import pytest
import torch

from d2scale.config.defaults import get_cfg
from d2scale.step.precision import bfloat16_faults, tf32_use


def test_float32_is_tf32_in_convolutions_of_newer_gpus():
    assert tf32_use(9) == "convolutions"
    assert tf32_use(7) == "nothing"


def test_what_the_user_allows_is_told():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert tf32_use(8) == "convolutions, matrix products"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def capabilities(monkeypatch):
    """Let torch see GPUs of these compute capabilities."""

    def see(*numbers):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(numbers))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(numbers))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: numbers[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")

    return see


def amp(precision, device="cuda"):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = device, True, precision
    return cfg


def test_bfloat16_is_refused_where_a_gpu_has_none(capabilities):
    capabilities((8, 0), (7, 5))
    (fault,) = bfloat16_faults(amp("bfloat16"))
    assert str(fault) == (
        "SOLVER.AMP.PRECISION is 'bfloat16'; allowed: float16 on GPU 1, which has no bfloat16; "
        "set it to float16, or SOLVER.AMP.ENABLED to False"
    )
    assert bfloat16_faults(amp("float16")) == bfloat16_faults(amp("bfloat16", "cpu")) == []
    capabilities((8, 6), (9, 0))
    assert bfloat16_faults(amp("bfloat16")) == []
