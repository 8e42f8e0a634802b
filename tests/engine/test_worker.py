from __future__ import annotations

import pytest
import torch

from d2scale.coco.digests import DataFacts
from d2scale.config.defaults import get_cfg
from d2scale.engine import worker


class PreparedError(Exception):
    """Ends a training that would begin."""


def test_the_memory_budget_binds_before_anything_is_built(monkeypatch, tmp_path):
    held = []

    def prepare(*arguments):
        raise PreparedError(len(held))

    monkeypatch.setattr(worker, "hold_to_budget", lambda *arguments: held.append(arguments))
    monkeypatch.setattr(worker, "plan_table", str)
    monkeypatch.setattr(worker, "_prepare", prepare)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.MODEL.DEVICE, cfg.D2SCALE.MEMORY.BUDGET_GIB = "cpu", 3.0
    job = worker.Job(cfg, None, resume=False, eval_only=False, data=DataFacts(images=1))
    with pytest.raises(PreparedError, match="1"):
        worker._train(job, None)
    assert held == [(torch.device("cpu"), 3.0)]
