"""A training script as a user of detectron2 writes it, with d2scale's trainer in it.

FAIL_RANK, FAIL_FROM and FAIL_IMAGES let training forwards run out of memory: those of a rank from a
forward on, with as many images. KILL_AFTER ends rank 0 after so many iterations.
"""

import os
import signal

import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from d2scale.detectron2.trainer import ScaledTrainer
from d2scale.step.out_of_memory import OutOfMemoryError


def failing(model):
    """Let a model's forward fail as the environment says."""
    forward, calls = model.forward, []
    rank, first, images = (int(os.environ[f"FAIL_{key}"]) for key in ("RANK", "FROM", "IMAGES"))

    def fail(batch):
        calls.append(len(batch))
        begun = comm.get_rank() == rank and len(calls) > first
        if model.training and begun and len(batch) >= images:
            raise OutOfMemoryError("out of memory")
        return forward(batch)

    model.forward = fail
    return model


class Kill(HookBase):
    """Ends the process as the system does that has no memory left."""

    def after_step(self):
        if self.trainer.iter + 1 == int(os.environ["KILL_AFTER"]) and comm.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MyTrainer(DefaultTrainer):
    """The user's own trainer."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        return failing(model) if "FAIL_RANK" in os.environ else model

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


class Trainer(ScaledTrainer, MyTrainer):
    """The user's own trainer, with d2scale's steps."""


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if "KILL_AFTER" in os.environ:
        trainer.register_hooks([Kill()])
    trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
        main(arguments)
        dist.destroy_process_group()
    else:
        launch(main, arguments.num_gpus, dist_url="auto", args=(arguments,))
