"""ResNet (arXiv 1512.03385) with detectron2's parameter names and its caffe-style stride."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meta_fcos.layers import ConvNorm, freeze

# Blocks in res2, res3, res4 and res5.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STAGES = ("res2", "res3", "res4", "res5")


class Stem(nn.Module):
    """A 7x7 convolution and a max pooling, together of stride 4."""

    def __init__(self, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, out_channels, 7, stride=2, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to (n, out_channels, h / 4, w / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """Base of both kinds of block: a branch beside a shortcut, and a ReLU after their sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.shortcut: ConvNorm | None = None
        if in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride=stride, norm=norm)
        # Activation checkpointing: keep the input, compute the rest again.
        self.recompute = False

    def branch(self, x: Tensor) -> Tensor:
        """Return the convolutions' output, to be added to the shortcut's."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, use_reentrant=False, preserve_rng_state=False)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.branch(x).add_(shortcut))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, for depths 18 and 34."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, norm=norm)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the middle one on ``width`` channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: str,
        *,
        width: int,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(in_channels, width, 1, stride=first, norm=norm)
        self.conv2 = ConvNorm(width, width, 3, stride=second, norm=norm)
        self.conv3 = ConvNorm(width, out_channels, 1, norm=norm)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        depth: 18, 34, 50 or 101.
        out_features: the stages to return, of res2 to res5; later stages are not built.
        norm: FrozenBN, BN or GN.
        res2_channels: channels of res2; every further stage doubles them.
        width: channels of a bottleneck's 3x3 convolution in res2 (depths 50 and 101).
        stride_in_1x1: a bottleneck's stride sits in its first convolution, not in its second.
        freeze_at: 1 freezes the stem, 2 also res2, and so on; 0 nothing.
    """

    def __init__(
        self,
        depth: int = 50,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        *,
        norm: str = "FrozenBN",
        stem_channels: int = 64,
        res2_channels: int = 256,
        width: int = 64,
        stride_in_1x1: bool = True,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.out_features = tuple(out_features)
        self.out_channels: dict[str, int] = {}
        self.stem = Stem(stem_channels, norm)
        self.stage_names = STAGES[: 1 + max(STAGES.index(name) for name in out_features)]
        channels = stem_channels
        for index, name in enumerate(self.stage_names):
            block: Any = BasicBlock
            if depth not in (18, 34):
                block = partial(Bottleneck, width=width << index, stride_in_1x1=stride_in_1x1)
            out = res2_channels << index
            blocks = [block(channels, out, 2 if index else 1, norm)]
            blocks += [block(out, out, 1, norm) for _ in range(BLOCKS[depth][index] - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            self.out_channels[name] = channels = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for part in ("stem", *self.stage_names)[:freeze_at]:
            freeze(getattr(self, part))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalized images (n, 3, h, w), h and w multiples of 32, to the stages asked for."""
        features = {}
        x = self.stem(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self.out_features:
                features[name] = x
        return features
