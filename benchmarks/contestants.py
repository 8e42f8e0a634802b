"""FCOS detectors with ResNet-50 and FPN, made alike: 60 classes, frozen batch norm, random weights.

detectron2's and AdelaiDet's are there where they are installed. Stem and first stage are frozen
in all of them. Each is fed the same images, boxes and classes, in the form that it takes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NUM_CLASSES = 60
# What makes MetaFCOS small enough to try a script in seconds.
NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
)
Sample = dict[str, Any]


class Contestant(NamedTuple):
    """A detector to measure.

    Attributes:
        model: in training mode.
        prepare: turns samples into what the model takes; not measured.
        losses: calls the model.
    """

    model: nn.Module
    prepare: Callable[[Sequence[Sample]], Any]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]


def make_samples(count: int, height: int, width: int, boxes: int = 7) -> list[Sample]:
    """Return ``count`` images of noise with boxes of COCO's number and sizes."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        side = (torch.rand(boxes, 2, generator=draw) ** 2).mul(0.8).add(0.03)
        corner = torch.rand(boxes, 2, generator=draw) * (1 - side)
        scale = torch.tensor([width, height] * 2)
        samples.append(
            {
                "image": torch.randint(256, (3, height, width), generator=draw, dtype=torch.uint8),
                "height": height,
                "width": width,
                "image_id": number,
                "boxes": torch.cat([corner, corner + side], dim=1) * scale,
                "classes": torch.randint(NUM_CLASSES, (boxes,), generator=draw),
            }
        )
    return samples


def _metafcos(device: torch.device, *changes: str) -> Contestant:
    from d2scale.config import load_cfg
    from d2scale.engine.models import new_model

    # The layout of the weights follows the device.
    options = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device.type, *changes]
    cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", options)
    return Contestant(new_model(cfg), list, exact_losses)


def exact_losses(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Call a model that computes its loss normalizers from the ground truth first."""
    with torch.no_grad():
        totals = model.loss_normalizers(samples)
    return dict(model(samples, normalizers=model.finish_normalizers(totals, 1)))


def metafcos(device: torch.device, narrow: bool = False) -> Contestant:
    """d2scale's, as the recipe has it."""
    return _metafcos(device, *(NARROW if narrow else ()))


def metafcos_other_layout(device: torch.device, narrow: bool = False) -> Contestant:
    """The same with channels last on a GPU, where it trains without, and without on a CPU."""
    contestant = metafcos(device, narrow)
    last = device.type == "cuda"
    contestant.model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    return contestant


def metafcos_paper(device: torch.device, narrow: bool = False) -> Contestant:
    """d2scale's with the layers of torchvision's: stride in the 3x3, 3x3 for the classes."""
    return _metafcos(
        *(device, "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
        *("MODEL.FCOS.CLS_LOGITS_KERNEL_SIZE", "3", *(NARROW if narrow else ())),
    )


def torchvision_fcos(device: torch.device, narrow: bool = False) -> Contestant:
    """torchvision's, built with the norm that it has when its weights are loaded."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18" if narrow else "resnet50",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    # One class more than there are, as in its own weights; the images keep their size.
    model = FCOS(backbone, NUM_CLASSES + 1, _skip_resize=True)

    def prepare(samples: Sequence[Sample]) -> Any:
        targets = [{"boxes": s["boxes"], "labels": s["classes"] + 1} for s in samples]
        return [sample["image"] / 255.0 for sample in samples], targets

    return Contestant(model, prepare, lambda m, batch: m(*batch))


def detectron2_fcos(device: torch.device, narrow: bool = False) -> Contestant:
    """detectron2's own."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    config = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    config.num_classes = NUM_CLASSES
    model = instantiate(config)
    return Contestant(model, _to_detectron2, _detectron2_losses)


def adelaidet_fcos(device: torch.device, narrow: bool = False) -> Contestant:
    """AdelaiDet's, by its R_50_1x settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import adet.modeling  # noqa: F401 - registers its models
        from adet.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "OneStageDetector"
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOS"
    cfg.MODEL.FCOS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device.type, ""
    return Contestant(build_model(cfg), _to_detectron2, _detectron2_losses)


def _to_detectron2(samples: Sequence[Sample]) -> Any:
    from detectron2.structures import Boxes, Instances

    batch = []
    for sample in samples:
        boxes, classes = Boxes(sample["boxes"]), sample["classes"]
        size = (sample["height"], sample["width"])
        instances = Instances(size, gt_boxes=boxes, gt_classes=classes)
        batch.append({**sample, "instances": instances})
    return batch


def _detectron2_losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = model(batch)
    return {name: value for name, value in losses.items() if "loss" in name}


BUILDERS: dict[str, tuple[str, Callable[[torch.device, bool], Contestant]]] = {
    "MetaFCOS, the recipe": ("d2scale", metafcos),
    "MetaFCOS, the other layout": ("d2scale", metafcos_other_layout),
    "MetaFCOS, torchvision's layers": ("d2scale", metafcos_paper),
    "torchvision fcos_resnet50_fpn": ("torchvision", torchvision_fcos),
    "detectron2 FCOS": ("detectron2", detectron2_fcos),
    "AdelaiDet FCOS": ("adet", adelaidet_fcos),
}


def build(name: str, device: torch.device, *, narrow: bool = False) -> Contestant | None:
    """Build a contestant in training mode on ``device``; None where it is not installed.

    ``narrow``: MetaFCOS and torchvision's with few layers and channels, to try a script.
    """
    package, builder = BUILDERS[name]
    if importlib.util.find_spec(package) is None:
        return None
    torch.manual_seed(0)
    contestant = builder(device, narrow)
    for module in contestant.model.modules():
        # Without weights of its own a frozen norm lets the activations grow from block to block.
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.weight.fill_(0.5)  # type: ignore[operator, union-attr]
    contestant.model.train().to(device)
    return contestant


def step(contestant: Contestant, batch: Any, precision: torch.dtype | None) -> None:
    """Forward and backward; the gradients stay."""
    device = next(contestant.model.parameters()).device.type
    context = (
        contextlib.nullcontext() if precision is None else torch.autocast(device, dtype=precision)
    )
    with context:
        losses = contestant.losses(contestant.model, batch)
        objective = torch.stack([loss.float() for loss in losses.values()]).sum()
    objective.backward()
