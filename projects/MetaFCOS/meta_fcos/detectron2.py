"""MetaFCOS for detectron2 and d2go: the same head and losses on detectron2's own backbone.

Needs detectron2. :func:`register` makes the names of the published recipes known:
``MetaOneStageDetector``, ``build_fcos_resnet_fpn_backbone`` and ``MetaFCOS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.backbone import build_backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2scale.errors import ConfigError, Fault
from d2scale.step import ranks
from meta_fcos.detector import OneStageDetector, Sample
from meta_fcos.proposals import MetaFCOS
from meta_fcos.validate import check_config


class MetaOneStageDetector(OneStageDetector):
    """The detector with detectron2's inputs and outputs."""

    @classmethod
    def from_config(cls, cfg: Any) -> MetaOneStageDetector:
        """Build it on the backbone and proposal generator that detectron2's registries name.

        Raises:
            ConfigError: with all faults of the keys that the model reads.
        """
        check_config(cfg)
        backbone = build_backbone(cfg)
        return cls(
            backbone,
            build_proposal_generator(cfg, backbone.output_shape()),
            in_features=cfg.MODEL.FCOS.IN_FEATURES,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(  # the signature that detectron2's trainers and evaluators call
        self, batched_inputs: Sequence[Mapping[str, Any]], normalizers: Any = None
    ) -> Any:
        """Return losses in training mode, otherwise a dict with ``instances`` for each image.

        Args:
            batched_inputs: detectron2's dicts with ``image``, ``height``, ``width`` and, in
                training, ``instances``.
            normalizers: see :class:`OneStageDetector`; None: of the images of all ranks.
        """
        samples = [_to_sample(entry) for entry in batched_inputs]
        if self.training:
            if normalizers is None:
                sums = super().loss_normalizers(samples)
                totals = {name: ranks.sum_over_ranks(value) for name, value in sums.items()}
                normalizers = self.finish_normalizers(totals, ranks.world_size())
            return super().forward(samples, normalizers)
        return [
            {"instances": _to_instances(detections, sample)}
            for detections, sample in zip(super().forward(samples), samples, strict=True)
        ]

    def loss_normalizers(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return sums over detectron2's or d2scale's samples that the losses are divided by."""
        return super().loss_normalizers([_to_sample(sample) for sample in samples])


def _to_sample(entry: Mapping[str, Any]) -> dict[str, Any]:
    height, width = entry["image"].shape[1:]
    sample = {"height": height, "width": width, **entry}
    instances = sample.pop("instances", None)
    if instances is not None:
        sample["boxes"] = instances.gt_boxes.tensor
        sample["classes"] = instances.gt_classes
    return sample


def _to_instances(detections: Any, sample: Sample) -> Instances:
    instances = Instances((sample["height"], sample["width"]))
    instances.pred_boxes = Boxes(detections["boxes"])
    instances.scores = detections["scores"]
    instances.pred_classes = detections["classes"]
    return instances


def build_fcos_resnet_fpn_backbone(cfg: Any, input_shape: Any) -> FPN:
    """Build detectron2's ResNet and FPN, with p6 made from p5.

    Raises:
        ConfigError: for what detectron2 cannot build, though the default engine can.
    """
    faults = _upstream_faults(cfg)
    if faults:
        raise ConfigError(faults)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _upstream_faults(cfg: Any) -> list[Fault]:
    fcos, resnets = cfg.MODEL.FCOS, cfg.MODEL.RESNETS
    faults = []
    if fcos.TOP_LEVELS != 2 or cfg.MODEL.FPN.IN_FEATURES[-1] != "res5":
        allowed = "2 in detectron2, on a pyramid that ends with res5"
        advice = "set it to 2, or use d2scale train"
        faults.append(Fault("MODEL.FCOS.TOP_LEVELS", fcos.TOP_LEVELS, allowed, advice))
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        allowed = "64 in detectron2 with DEPTH 18 and 34"
        advice = "set it to 64, or use d2scale train"
        key = "MODEL.RESNETS.RES2_OUT_CHANNELS"
        faults.append(Fault(key, resnets.RES2_OUT_CHANNELS, allowed, advice))
    return faults


def _build_meta_fcos(cfg: Any, input_shape: Any) -> MetaFCOS:
    return MetaFCOS.from_config(cfg)


def register() -> None:
    """Register the published names with detectron2 and, if it is installed, d2go."""
    name = "build_fcos_resnet_fpn_backbone"
    _register_once(BACKBONE_REGISTRY, name, build_fcos_resnet_fpn_backbone)
    _register_once(PROPOSAL_GENERATOR_REGISTRY, "MetaFCOS", _build_meta_fcos)
    registries = [META_ARCH_REGISTRY]
    if importlib.util.find_spec("d2go") is not None:
        from d2go.registry.builtin import META_ARCH_REGISTRY as D2GO_META_ARCH_REGISTRY

        registries.append(D2GO_META_ARCH_REGISTRY)
    for registry in registries:
        _register_once(registry, "MetaOneStageDetector", MetaOneStageDetector.from_config)


def _register_once(registry: Any, name: str, build: Callable[..., nn.Module]) -> None:
    if name in registry:
        return

    def builder(*arguments: Any) -> nn.Module:
        return build(*arguments)

    builder.__name__ = name  # the registries take it as the key
    registry.register()(builder)  # the call that both kinds of registry have
