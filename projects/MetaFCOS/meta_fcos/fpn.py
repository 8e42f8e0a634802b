"""Feature pyramid (FPN, arXiv 1612.03144) with extra coarse levels and detectron2's names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from meta_fcos.layers import ConvNorm
from meta_fcos.resnet import STAGES, ResNet


class TopBlock(nn.Module):
    """Levels beyond the last one of the FPN: p6 from p5, p7 from relu(p6)."""

    def __init__(self, channels: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in self.names:
            self.add_module(name, nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (n, channels, h, w) to maps of half and a quarter of its size, rounded up."""
        levels: list[Tensor] = []
        for name in self.names:
            source = F.relu(levels[-1]) if levels else x
            levels.append(getattr(self, name)(source))
        return levels


class FPN(nn.Module):
    """A bottom-up network and the pyramid on it.

    Args:
        in_features: neighbouring stages of ``bottom_up``, from fine to coarse.
        norm: after the convolutions of the FPN; empty: none.
        fuse: "sum" or "avg", how a coarser level joins a finer one.
        top_levels: levels beyond the last stage's (2: p6 and p7 after res5).
    """

    def __init__(
        self,
        bottom_up: ResNet,
        in_features: Sequence[str] = ("res3", "res4", "res5"),
        *,
        channels: int = 256,
        norm: str = "",
        fuse: str = "sum",
        top_levels: int = 2,
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.average = fuse == "avg"
        self.numbers = tuple(STAGES.index(name) + 2 for name in in_features)
        conv = partial(ConvNorm, bias=norm == "", norm=norm)
        for name, number in zip(in_features, self.numbers, strict=True):
            lateral = conv(bottom_up.out_channels[name], channels, 1)
            self.add_module(f"fpn_lateral{number}", lateral)
            self.add_module(f"fpn_output{number}", conv(channels, channels, 3))
        last = self.numbers[-1]
        self.top_block = TopBlock(channels, [f"p{last + 1 + i}" for i in range(top_levels)])
        self.out_names = (*(f"p{number}" for number in self.numbers), *self.top_block.names)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("bottom_up."):
                # a=1 is the uniform filling that caffe2 calls Xavier.
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalized images (n, 3, h, w), h and w multiples of 32, to the pyramid's levels.

        By name, from fine to coarse: (n, channels, h / s, w / s), rounded up, s the stride.
        """
        stages = self.bottom_up(images)
        levels: list[Tensor] = []
        fused: Tensor | None = None
        for name, number in zip(reversed(self.in_features), reversed(self.numbers), strict=True):
            lateral = getattr(self, f"fpn_lateral{number}")(stages[name])
            if fused is not None:
                lateral.add_(F.interpolate(fused, scale_factor=2.0, mode="nearest"))
                lateral = lateral / 2 if self.average else lateral
            fused = lateral
            levels.insert(0, getattr(self, f"fpn_output{number}")(fused))
        levels += self.top_block(levels[-1])
        return dict(zip(self.out_names, levels, strict=True))
