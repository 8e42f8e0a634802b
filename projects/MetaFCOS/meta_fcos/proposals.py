"""MetaFCOS, pretraining stage: head, targets, losses and post-processing in one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meta_fcos.head import FCOSHead
from meta_fcos.inference import Detections, InferenceRule
from meta_fcos.losses import LossRule, finish_normalizers
from meta_fcos.targets import TargetRule, Targets, level_shapes


class MetaFCOS(nn.Module):
    """The head with its targets, losses and post-processing.

    Any backbone can feed it: the locations follow from the shapes of the levels.
    """

    def __init__(
        self,
        head: FCOSHead,
        target_rule: TargetRule | None = None,
        loss_rule: LossRule | None = None,
        inference_rule: InferenceRule | None = None,
    ) -> None:
        super().__init__()
        self.fcos_head = head
        self.target_rule = target_rule or TargetRule()
        self.loss_rule = loss_rule or LossRule()
        self.inference_rule = inference_rule or InferenceRule(self.target_rule.strides)

    @classmethod
    def from_config(cls, cfg: Any) -> MetaFCOS:
        """Build what ``cfg.MODEL.FCOS`` describes, on levels of ``MODEL.FPN.OUT_CHANNELS``."""
        fcos = cfg.MODEL.FCOS
        strides = tuple(fcos.FPN_STRIDES)
        head = FCOSHead(
            cfg.MODEL.FPN.OUT_CHANNELS,
            fcos.NUM_CLASSES,
            len(strides),
            num_cls_convs=fcos.NUM_CLS_CONVS,
            num_box_convs=fcos.NUM_BOX_CONVS,
            cls_logits_kernel=fcos.CLS_LOGITS_KERNEL_SIZE,
            use_scale=fcos.USE_SCALE,
            prior_prob=fcos.PRIOR_PROB,
        )
        sizes = tuple(fcos.SIZES_OF_INTEREST)
        return cls(
            head,
            TargetRule(strides, sizes, fcos.CENTER_SAMPLE, fcos.POS_RADIUS),
            LossRule(fcos.LOSS_ALPHA, fcos.LOSS_GAMMA, fcos.LOC_LOSS_TYPE),
            InferenceRule(
                strides,
                fcos.INFERENCE_TH_TEST,
                fcos.THRESH_WITH_CTR,
                fcos.PRE_NMS_TOPK_TEST,
                fcos.NMS_TH,
                fcos.POST_NMS_TOPK_TEST,
            ),
        )

    def forward(
        self,
        features: Sequence[Tensor],
        targets: Targets | None = None,
        normalizers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the losses if there are ``targets``, the detections otherwise.

        Args:
            features: (n, c, h, w) a level, from fine to coarse, of n padded images.
            targets: of those images; see :meth:`assign`.
            normalizers: finished divisors of the losses; None: of this batch alone.
        """
        outputs = self.fcos_head(features)
        if targets is None:
            return self.inference_rule(outputs)
        if normalizers is None:
            normalizers = finish_normalizers(targets.sums(), world_size=1)
        return self.loss_rule(outputs, targets, normalizers)

    @property
    def target_dtype(self) -> torch.dtype:
        """Precision of targets and losses: the parameters', but float32 at least."""
        return torch.promote_types(self.fcos_head.bbox_pred.weight.dtype, torch.float32)

    def assign(
        self, boxes: Sequence[Tensor], classes: Sequence[Tensor], size: tuple[int, int]
    ) -> Targets:
        """Return the targets of images that are padded to ``size`` (height, width).

        Args:
            boxes: one image each: (k, 4), x0 y0 x1 y1 in pixels of the padded image.
            classes: one image each: (k,), int64.
            size: see above; the levels of its features follow from it.
        """
        shapes = level_shapes(size, self.target_rule.strides)
        device = self.fcos_head.bbox_pred.weight.device
        return self.target_rule.assign(boxes, classes, shapes, self.target_dtype, device)
