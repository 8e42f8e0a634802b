"""Small RetinaNet and FCOS of detectron2, and samples of mixed sizes for them."""

from __future__ import annotations

import torch

CLASSES = 5


def retinanet():
    """RetinaNet with a ResNet-18 of frozen batch norm."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x * 2 ** (1 / 3)] for x in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES = CLASSES
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    return build_model(cfg)


def fcos():
    """FCOS on the body of :func:`retinanet`."""
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    body = retinanet()
    shapes = list(body.backbone.output_shape().values())
    head = FCOSHead(input_shape=shapes, num_classes=CLASSES, conv_dims=[32])
    return FCOS(
        backbone=body.backbone,
        head=head,
        num_classes=CLASSES,
        pixel_mean=[103.5, 116.3, 123.7],
        pixel_std=[1.0, 1.0, 1.0],
    )


def samples(count, seed=0):
    """Images of mixed sizes; every third has no object."""
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for number in range(count):
        height, width = integers(40, 140, 2).tolist()
        objects = 0 if number % 3 == 2 else int(integers(1, 5, 1))
        corners = torch.rand(objects, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        sizes = 8 + torch.rand(objects, 2, generator=generator) * 30
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], 1).double())
        instances.gt_classes = integers(0, CLASSES, objects)
        image = integers(0, 256, 3, height, width).to(torch.uint8)
        made.append({"image": image, "instances": instances, "height": height, "width": width})
    return made
