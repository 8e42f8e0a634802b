"""A small MetaFCOS and samples, importable in spawned ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from d2scale.config import load_cfg
from d2scale.engine.models import new_model

_SMALL = (
    *("MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", "GN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
    *("D2SCALE.EXACT", "True"),
)


def small_cfg(device: str, *changes: Any) -> Any:
    """The recipe of MetaFCOS with few layers and channels."""
    opts = [*_SMALL, "MODEL.DEVICE", device, *map(str, changes)]
    return load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", opts)


def small_detector(device: str, dtype: torch.dtype = torch.float32, *changes: Any) -> nn.Module:
    """The same weights on every device, in training mode."""
    torch.manual_seed(0)
    return new_model(small_cfg("cpu", *changes)).to(device, dtype).train()


def detector_samples(count: int, side: int = 96) -> list[dict[str, Any]]:
    """Images of noise of two sizes with a few boxes, padded alike."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        height, width = (side, side - 24) if number % 2 else (side - 24, side)
        corner, edge = torch.rand(2, 3, 2, generator=draw)
        edge = (edge * 0.6 + 0.1).minimum(1 - corner * 0.7)
        boxes = torch.cat([corner * 0.7, corner * 0.7 + edge], dim=1).clamp(max=1)
        samples.append(
            {
                "image": torch.randint(256, (3, height, width), generator=draw).byte(),
                "height": height,
                "width": width,
                "image_id": number,
                "file_name": f"{number}.jpg",
                "boxes": boxes * torch.tensor([width, height] * 2),
                "classes": torch.randint(60, (3,), generator=draw),
                "pad_to": (side, side),
            }
        )
    return samples


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients on the host, in double precision."""
    return {
        name: p.grad.detach().double().cpu()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of all differences over that of what is expected."""
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return (error / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
