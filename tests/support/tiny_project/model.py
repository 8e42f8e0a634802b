import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


class TinyDetector(nn.Module):
    """Learns to give the mean of an image; detects nothing."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)

    def forward(self, samples):
        images = [sample["image"].float() / 255 for sample in samples]
        if not self.training:
            nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
            return [{**nothing, "classes": torch.zeros(0, dtype=torch.int64)} for _ in samples]
        errors = [(self.conv(image).mean() - image.mean()) ** 2 for image in images]
        return {"loss_tiny": torch.stack(errors).mean()}


def build_tiny_detector(cfg):
    logger.info("a tiny detector of %d channels", cfg.MODEL.TINY.CHANNELS)
    return TinyDetector(cfg.MODEL.TINY.CHANNELS)
