"""A model with detectron2's synchronised batch norm, on any number of ranks."""

from __future__ import annotations

import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from d2scale.step import ranks
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import OptimizerStep


class SynchronisedModel(nn.Module):
    """Its loss is a mean over images, and its statistics are those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), NaiveSyncBatchNorm(4), nn.Conv2d(4, 1, 1))
        self.double()

    def forward(self, samples):
        return {"loss": self.body(torch.stack([s["image"] for s in samples])).square().mean()}


def synchronised_weights(images: int, steps: int):
    """The weights after some steps of so many images, shared out evenly in one forward each."""
    model = SynchronisedModel()
    if ranks.world_size() == 1:
        without_synchronised_norms(model)
    share = images // ranks.world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = OptimizerStep(model, optimizer, ims_per_gpu=share)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)
        own = pixels[share * ranks.rank() :][:share]
        step([{"image": image} for image in own])
    return {name: value.clone() for name, value in model.state_dict().items()}
