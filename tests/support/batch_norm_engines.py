"""Trainings of detectron2 and of d2go with a model whose batch norm trains, on any ranks."""

from __future__ import annotations

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer
from torch import nn

from d2scale.config.defaults import add_d2scale_config
from d2scale.step import ranks

IMAGES, STEPS = 4, 3


class BatchNormModel(nn.Module):
    """Its loss is a mean over images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
        self.double()

    def forward(self, samples):
        maps = self.body(torch.stack([sample["pixels"] for sample in samples]))
        return {"loss": maps.square().mean()}


def own_batches():
    """This rank's share of every step, the same images on any number of ranks."""
    generator = torch.Generator().manual_seed(0)
    share = IMAGES // ranks.world_size()
    for _ in range(STEPS):
        pixels = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield [{"pixels": image} for image in pixels[share * ranks.rank() :][:share]]


def described(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return type(model.body[1]).__name__, values


def with_detectron2(folder):
    """The kind of norm and the weights that detectron2's trainer leaves with d2scale's steps."""
    from d2scale.detectron2.training import Scaling

    cfg = get_cfg()
    add_d2scale_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", "BN"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = IMAGES, 1
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.OUTPUT_DIR = STEPS, (), folder
    cfg.D2SCALE.VIRTUAL_RANKS = "off"
    scaling = Scaling(cfg)
    model = BatchNormModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SimpleTrainer(model, [*own_batches()], optimizer)
    scaling.take_steps(trainer, DetectionCheckpointer(model, folder, trainer=trainer))
    trainer.train(0, STEPS)
    return described(model)


def with_d2go(folder):
    """The same of d2go's own training by the Runner."""
    from pathlib import Path

    import toy_d2go

    class BatchNormRunner(toy_d2go.ToyRunner):
        def build_detection_train_loader(self, cfg, *args, **kwargs):
            return [*own_batches()]

    settings = {
        "SOLVER.AUTO_SCALING_METHODS": ("d2scale_keep_total",),
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 0,
        "D2SCALE.IMS_PER_GPU": 0,
        "D2SCALE.VIRTUAL_RANKS": "off",
    }
    cfg = toy_d2go.config(Path(folder), settings)
    model, runner = BatchNormModel(), BatchNormRunner()
    runner._recipe = toy_d2go.recipe_of(cfg)
    runner.do_train(cfg, model, resume=False)
    return described(model)
