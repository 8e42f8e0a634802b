"""What ranks do with synchronised batch norm, importable in spawned ranks."""

from __future__ import annotations

import torch
from torch import nn

from d2scale.step.norms import synchronise_norms
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.ranks import rank, world_size
from standins import out_of_memory


def synchronised_training(synchronised=True):
    """Weights and statistics after 3 steps of 8 images, which two ranks share unevenly."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).double()
    synchronise_norms(model, synchronised and world_size() > 1)
    own = slice(None) if world_size() == 1 else (slice(5), slice(5, None))[rank()]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, samples):
            images = torch.stack([sample["image"] for sample in samples])
            return {"loss": self.body(images).square().mean(), "other": self.body[0].weight.sum()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = OptimizerStep(Model(), optimizer, ims_per_gpu=8)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 9, 9, generator=generator, dtype=torch.float64)
        step([{"image": image} for image in images[own]])
    return {name: value.clone() for name, value in model.state_dict().items()}


def norms_of_two_ranks():
    """What two ranks train, synchronised and apart, and the kinds of layers that become so."""
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4)
    )
    model[1].eval()
    kinds = [type(layer).__name__ for layer in synchronise_norms(model, True)]
    return synchronised_training(), synchronised_training(synchronised=False), kinds


def out_of_memory_with_synchronised_norms():
    """A step in which the last rank fails before the norm for which the others wait."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, samples):
            if rank() == world_size() - 1:
                raise out_of_memory()
            return {"loss": self.norm(torch.stack([s["image"] for s in samples])).sum()}

    model = synchronise_norms(Model(), True)
    step = OptimizerStep(model, torch.optim.SGD(model.parameters(), lr=0.1), ims_per_gpu=2)
    step([{"image": torch.rand(3, 4, 4)}] * 2)
