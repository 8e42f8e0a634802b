"""What ranks that share one device run, importable in spawned ranks."""

from __future__ import annotations

import torch

from d2scale.engine.data.sampling import rank_slice
from d2scale.engine.step import build_step
from d2scale.step.ranks import rank, world_size
from small_detector import detector_samples, gradients, small_cfg, small_detector


def step_on_shared_device(device: str):
    """The gradients and the weights of a step, each rank with its share of four images."""
    model = small_detector(device, torch.float64)
    step = build_step(small_cfg(device), model, ims_per_gpu=2)
    share = detector_samples(4, side=64)[rank_slice(4, world_size(), rank())]
    found = {}
    step(share, lambda _: found.update(gradients(model)))
    return found, {name: p.detach().cpu() for name, p in model.named_parameters()}
