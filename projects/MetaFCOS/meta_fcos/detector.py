"""The whole detector: from images of any size to losses, or to boxes in the original images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meta_fcos.fpn import FPN
from meta_fcos.inference import Detections, rescale
from meta_fcos.losses import finish_normalizers
from meta_fcos.proposals import MetaFCOS
from meta_fcos.resnet import ResidualBlock, ResNet
from meta_fcos.targets import Targets
from meta_fcos.validate import check_config
from meta_fcos.weights import load_weights

logger = logging.getLogger(__name__)

Sample = Mapping[str, Any]
# Padded sizes are multiples of it, so that every stage of the backbone halves evenly.
SIZE_DIVISOR = 32


class OneStageDetector(nn.Module):
    """A backbone and MetaFCOS on its pyramid.

    A sample is a dict of one image: ``image``, uint8 (3, h, w) in the channel order of the pixel
    mean; ``height`` and ``width`` of the original, in pixels; in training ``boxes``, float32
    (k, 4), x0 y0 x1 y1 in pixels of ``image``, and ``classes``, int64 (k,); optionally
    ``pad_to``, (h, w), the least size of the padded batch. The backbone maps images (n, 3, h, w)
    to levels by name, from fine to coarse, of which the proposal generator reads ``in_features``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: MetaFCOS,
        *,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        pixel_mean: Sequence[float] = (103.53, 116.28, 123.675),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.in_features = tuple(in_features)
        self._targets_once = TargetsOnce(proposal_generator.assign)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixel_mean, pixel_std))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @classmethod
    def from_config(cls, cfg: Any) -> OneStageDetector:
        """Build the detector that ``cfg`` describes; ConfigError with all faults of its keys."""
        check_config(cfg)
        backbone, proposal_generator = cls.build_parts(cfg)
        return cls(
            backbone,
            proposal_generator,
            in_features=cfg.MODEL.FCOS.IN_FEATURES,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )

    @staticmethod
    def build_parts(cfg: Any) -> tuple[nn.Module, MetaFCOS]:
        """Return the backbone and the proposal generator that ``cfg`` describes."""
        resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
        bottom_up = ResNet(
            resnets.DEPTH,
            fpn.IN_FEATURES,
            norm=resnets.NORM,
            stem_channels=resnets.STEM_OUT_CHANNELS,
            res2_channels=resnets.RES2_OUT_CHANNELS,
            width=resnets.WIDTH_PER_GROUP,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        )
        backbone = FPN(
            bottom_up,
            fpn.IN_FEATURES,
            channels=fpn.OUT_CHANNELS,
            norm=fpn.NORM,
            fuse=fpn.FUSE_TYPE,
            top_levels=cfg.MODEL.FCOS.TOP_LEVELS,
        )
        return backbone, MetaFCOS.from_config(cfg)

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return self.proposal_generator.fcos_head.cls_logits.out_channels

    def forward(
        self, samples: Sequence[Sample], normalizers: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the losses in training mode, the detections otherwise.

        The losses are scalars, divided by the ``normalizers`` of the whole optimizer step or, if
        there are none, by this batch's own sums. Detections are one dict a sample, best first:
        boxes (k, 4), x0 y0 x1 y1 in pixels of the original image, clipped; scores (k,); classes
        (k,), int64.
        """
        targets = self._targets_once.take(samples) if self.training else None
        levels = self.backbone(self._batch(samples))
        features = [levels[name] for name in self.in_features]
        if targets is not None:
            return self.proposal_generator(features, targets, normalizers)
        detections = self.proposal_generator(features)
        return [
            rescale(image, sample["image"].shape[1:], (sample["height"], sample["width"]))
            for image, sample in zip(detections, samples, strict=True)
        ]

    def load_weights(self, path: Path) -> None:
        """Load published weights in place; see `meta_fcos.weights.load_weights`."""
        load_weights(self, path)

    def loss_normalizers(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return sums over ``samples`` that the losses are divided by, from the ground truth.

        They are added over the micro-batches and ranks of an optimizer step; the total goes
        through `finish_normalizers` into every forward of the step.
        """
        return self._targets_once(samples).sums()

    def finish_normalizers(
        self, totals: Mapping[str, Tensor], world_size: int
    ) -> dict[str, Tensor]:
        """Return the divisors of the losses; see `meta_fcos.losses.finish_normalizers`."""
        return finish_normalizers(totals, world_size)

    def checkpoint_activations(self) -> None:
        """From now on keep only the inputs of residual blocks and head towers for backward."""
        self.proposal_generator.fcos_head.recompute_towers = True
        for module in self.backbone.modules():
            if isinstance(module, ResidualBlock):
                module.recompute = True

    def _batch(self, samples: Sequence[Sample]) -> Tensor:
        """Return normalized images (n, 3, h, w), padded with zeros at the right and bottom."""
        mean, std = self.pixel_mean, self.pixel_std
        # The convolutions keep the format; on a CPU they are faster with channels last.
        layout = torch.channels_last if mean.device.type == "cpu" else torch.contiguous_format
        shape = (len(samples), 3, *padded_size(samples))
        batch = torch.empty(shape, dtype=mean.dtype, device=mean.device, memory_format=layout)
        batch.copy_(mean)  # becomes zero
        for row, sample in zip(batch, samples, strict=True):
            image = sample["image"].to(mean.device, non_blocking=True)
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch.sub_(mean).div_(std)


class TargetsOnce:
    """Assigns the targets of a batch once, for its loss normalizers and for its losses.

    Between the two it keeps them by the ground truth's own tensors: they are a batch's samples in
    another dict too.
    """

    def __init__(self, assign: Callable[..., Targets]) -> None:
        self._assign = assign
        self._kept: dict[tuple[Any, ...], tuple[list[Tensor], Targets]] = {}
        self._taking = False

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Targets:
        """Return the targets of ``samples``, and keep them until they are taken."""
        if self._taking:  # a new step: what is left is of one that failed
            self._kept.clear()
            self._taking = False
        boxes = [sample["boxes"] for sample in samples]
        classes = [sample["classes"] for sample in samples]
        targets = self._assign(boxes, classes, padded_size(samples))
        self._kept[_key(samples)] = (boxes, targets)
        return targets

    def take(self, samples: Sequence[Sample]) -> Targets:
        """Return the targets of ``samples`` and forget them."""
        key = _key(samples)
        if key not in self._kept:
            self(samples)
        self._taking = True
        return self._kept.pop(key)[1]


def _key(samples: Sequence[Sample]) -> tuple[Any, ...]:
    # The tensors are kept as well, so that no other gets their number.
    return (padded_size(samples), *(id(sample["boxes"]) for sample in samples))


def padded_size(samples: Sequence[Sample]) -> tuple[int, int]:
    """Return the height and width of the batch: of every image and ``pad_to``, rounded up."""
    sizes = [tuple(sample["image"].shape[1:]) for sample in samples]
    sizes += [sample["pad_to"] for sample in samples if "pad_to" in sample]
    height, width = (
        math.ceil(max(sides) / SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True)
    )
    return height, width


def build_detector(cfg: Any) -> OneStageDetector:
    """Build the model of a config whose MODEL.META_ARCHITECTURE is MetaOneStageDetector."""
    model = OneStageDetector.from_config(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        # As the images in `_batch`: else every convolution rearranges its weights twice a step.
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.RESNETS.NORM == "FrozenBN" and not cfg.MODEL.WEIGHTS:
        logger.warning(
            "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM is FrozenBN, which changes nothing "
            "until weights are loaded: to train from random weights, use GN"
        )
    return model
