"""d2go's own training of a model of five weights, in this process, on numbers for images."""

from __future__ import annotations

import itertools
import json
import time

import torch
from d2go.modeling import ema
from detectron2.engine import HookBase
from torch import nn

from d2scale import Runner
from d2scale.planning.progress import recipe_of
from d2scale.step.out_of_memory import OutOfMemoryError

RECIPE = {
    "MODEL.DEVICE": "cpu",
    "SOLVER.REFERENCE_WORLD_SIZE": 1,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 24,
    "SOLVER.STEPS": (18,),
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.WARMUP_FACTOR": 0.1,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.CHECKPOINT_PERIOD": 8,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "TEST.EVAL_PERIOD": 0,
    "PROFILERS": [],
    "WRITER_PERIOD": 1,
    "D2SCALE.IMS_PER_GPU": 1,
}


class Model(nn.Module):
    """Fits a line through points with noise."""

    def __init__(self, seconds_an_image=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self._seconds = seconds_an_image

    def forward(self, samples):
        time.sleep(self._seconds * len(samples))
        inputs = torch.stack([sample["inputs"] for sample in samples])
        targets = torch.stack([sample["target"] for sample in samples])
        return {"loss": (self.layer(inputs)[:, 0] - targets).square().mean()}


def batches(ims_per_batch, noise=2.0):
    """Yield batches endlessly, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    while True:
        inputs = torch.randn(ims_per_batch, 4, generator=generator)
        targets = inputs.sum(1) + noise * torch.randn(ims_per_batch, generator=generator)
        yield [{"inputs": i, "target": t} for i, t in zip(inputs, targets, strict=True)]


class Record(HookBase):
    """Keeps weights and EMA, and which steps were done, after each iteration."""

    def __init__(self, runner, model):
        self._clock, self._model = runner._record.clock, model
        self.rows = []

    def after_step(self):
        weights = nn.utils.parameters_to_vector(self._model.parameters()).detach().clone()
        average = getattr(self._model, "ema_state", None)
        averaged = average and torch.cat([v.flatten() for v in average.state.values()])
        self.rows.append(
            (self._clock.steps, self._clock.gain, time.perf_counter(), weights, averaged)
        )


class ToyRunner(Runner):
    """A Runner whose batches go on where a checkpoint has left them."""

    def __init__(self, noise=2.0, steps=None, fails_at=()):
        super().__init__()
        self._noise, self._steps, self._fails_at = noise, steps, fails_at

    def build_detection_train_loader(self, cfg, *args, **kwargs):
        done = self._record.clock.steps
        return itertools.islice(batches(cfg.SOLVER.IMS_PER_BATCH, self._noise), done, self._steps)

    def build_optimizer(self, cfg, model):
        optimizer = super().build_optimizer(cfg, model)
        calls = itertools.count(1)

        def fail(*args):
            if next(calls) in self._fails_at:
                raise OutOfMemoryError("out of memory")

        optimizer.register_step_post_hook(fail)
        return optimizer

    def _get_trainer_hooks(self, cfg, model, *args):
        self.seen = Record(self, model)
        return [*super()._get_trainer_hooks(cfg, model, *args), self.seen]


def config(folder, settings):
    cfg = Runner.get_default_cfg()
    for key, value in {**RECIPE, "OUTPUT_DIR": str(folder), **settings}.items():
        cfg.merge_from_list([key, value])
    folder.mkdir(exist_ok=True)
    return cfg


def train(folder, settings, *, resume=False, seconds_an_image=0.0, **options):
    """Train as ``d2go.train_net`` does in one process; return the model and its Record.

    ``options`` are those of ToyRunner.
    """
    cfg = config(folder, settings)
    model, runner = Model(seconds_an_image), ToyRunner(**options)
    ema.may_build_model_ema(cfg, model)
    runner._recipe = recipe_of(cfg)
    runner.do_train(cfg, model, resume)
    return model, runner.seen.rows


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line for line in lines}
