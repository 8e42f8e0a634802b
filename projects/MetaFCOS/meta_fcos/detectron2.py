"""MetaFCOS for detectron2 and d2go: the same head and losses on detectron2's own backbone.

Needs detectron2. :func:`register` makes the names of the published recipes known:
``MetaOneStageDetector``, ``build_fcos_resnet_fpn_backbone`` and ``MetaFCOS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class MetaOneStageDetector(OneStageDetector):
    """The detector with detectron2's inputs and outputs."""

    @staticmethod
    def build_parts(cfg: Any) -> tuple[nn.Module, MetaFCOS]:
        """Return the backbone and proposal generator that detectron2's registries name."""
        backbone = build_backbone(cfg)
        return backbone, build_proposal_generator(cfg, backbone.output_shape())

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(  # the signature that detectron2's trainers and evaluators call
        self, batched_inputs: Sequence[Mapping[str, Any]], normalizers: Any = None
    ) -> Any:
        """Return losses in training mode, otherwise a dict with ``instances`` for each image.

        Without ``normalizers`` the losses are divided by the sums over the images of all ranks.
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
    if "instances" in sample:
        instances = sample.pop("instances")
        sample.update(boxes=instances.gt_boxes.tensor, classes=instances.gt_classes)
    return sample


def _to_instances(detections: Any, sample: Sample) -> Instances:
    instances = Instances((sample["height"], sample["width"]))
    instances.pred_boxes = Boxes(detections["boxes"])
    instances.scores = detections["scores"]
    instances.pred_classes = detections["classes"]
    return instances


def build_fcos_resnet_fpn_backbone(cfg: Any, input_shape: Any) -> FPN:
    """Build detectron2's ResNet and FPN, with p6 made from p5.

    A ConfigError names what detectron2 cannot build, though the default engine can.
    """
    if faults := list(_upstream_faults(cfg)):
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


def _upstream_faults(cfg: Any) -> Iterator[Fault]:
    levels, channels = cfg.MODEL.FCOS.TOP_LEVELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    if levels != 2 or cfg.MODEL.FPN.IN_FEATURES[-1] != "res5":
        allowed = "2 in detectron2, on a pyramid that ends with res5"
        yield Fault("MODEL.FCOS.TOP_LEVELS", levels, allowed, "set it to 2, or use d2scale train")
    if cfg.MODEL.RESNETS.DEPTH in (18, 34) and channels != 64:
        allowed = "64 in detectron2 with DEPTH 18 and 34"
        advice = "set it to 64, or use d2scale train"
        yield Fault("MODEL.RESNETS.RES2_OUT_CHANNELS", channels, allowed, advice)


def register() -> None:
    """Register the published names with detectron2 and, if it is installed, d2go."""
    name = "build_fcos_resnet_fpn_backbone"
    _register_once(BACKBONE_REGISTRY, name, build_fcos_resnet_fpn_backbone)
    build = MetaFCOS.from_config
    _register_once(PROPOSAL_GENERATOR_REGISTRY, "MetaFCOS", lambda cfg, input_shape: build(cfg))
    registries = [META_ARCH_REGISTRY]
    if importlib.util.find_spec("d2go") is not None:
        from d2go.registry.builtin import META_ARCH_REGISTRY as D2GO_META_ARCH_REGISTRY

        registries.append(D2GO_META_ARCH_REGISTRY)
    for registry in registries:
        _register_once(registry, "MetaOneStageDetector", MetaOneStageDetector.from_config)


def _register_once(registry: Any, name: str, build: Callable[..., nn.Module]) -> None:
    def builder(*arguments: Any) -> nn.Module:
        return build(*arguments)

    builder.__name__ = name  # the registries take it as the key
    if name not in registry:
        registry.register()(builder)  # the call that both kinds of registry have
