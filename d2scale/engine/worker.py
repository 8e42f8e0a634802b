"""What one rank of a run does: build everything, train, evaluate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn

from d2scale import __version__
from d2scale.coco.dataset import load_dataset, load_training_dataset
from d2scale.config.loading import flatten
from d2scale.engine.actions import Evaluate, Report, Save
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.resume import Position, Resumer, record
from d2scale.engine.data.loader import TrainLoader, build_test_loader, build_train_loader
from d2scale.engine.evaluation import evaluate, format_results
from d2scale.engine.models import build_model, device_of, load_initial_weights
from d2scale.engine.planning import plan_on_ranks, planned_cfg
from d2scale.engine.solver import build_lr_schedule
from d2scale.engine.splitting import RecordSplit
from d2scale.engine.step import build_step
from d2scale.engine.telemetry.logs import logging_to
from d2scale.engine.telemetry.machine import describe_machine
from d2scale.engine.telemetry.writers import JsonWriter, Reporter, TensorBoardWriter, Writer
from d2scale.engine.trainer import Trainer
from d2scale.planning.formats import plan_table
from d2scale.planning.plan import Plan
from d2scale.planning.progress import recipe_of
from d2scale.run_folder.contents import write_config, write_machine, write_plan
from d2scale.run_folder.files import INFERENCE_FOLDER, make_folder
from d2scale.run_folder.lock import run_lock
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.ranks import broadcast_model, rank, refuse_differences, world_size

logger = logging.getLogger(__name__)

Results = dict[str, float]

# Each machine may have its own folder and its own number of cores.
_OWN_OF_A_MACHINE = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS")


@dataclass(frozen=True)
class Job:
    """What a run was asked for. Every rank has one, and all must agree.

    Attributes:
        cfg: the recipe, for this machine.
        method: a scaling method; None: the one of the recipe.
        resume: go on from the last checkpoint in the run's folder, if there is one.
        eval_only: evaluate and stop.
        images: in the training dataset; 0 if the run does not train.
        notes: lines for the log about what was decided before the log began.
    """

    cfg: CfgNode
    method: str | None
    resume: bool
    eval_only: bool
    images: int
    notes: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the name that the user knows."""
        keys = dict(flatten(self.cfg))
        return {
            **{key: value for key, value in keys.items() if key not in _OWN_OF_A_MACHINE},
            "--method": self.method,
            "--resume": self.resume,
            "--eval-only": self.eval_only,
            "images in DATASETS.TRAIN": self.images,
            "version of d2scale": __version__,
        }


def run_rank(job: Job) -> Results:
    """Plan, train and evaluate, or only evaluate, on this rank.

    Returns:
        The metrics of the last evaluation, under the names that ``metrics.json`` uses; empty
        without ``DATASETS.TEST``, and on all ranks but the first.

    Raises:
        D2ScaleError: for what the user can mend.
    """
    refuse_differences(job.settings(), "start the run with the same on every machine")
    plan = None if job.eval_only else plan_on_ranks(job.cfg, job.method, job.images)
    folder = Path(job.cfg.OUTPUT_DIR)
    make_folder(folder)
    writes = plan is not None and rank() == 0
    with run_lock(folder) if writes else nullcontext(), logging_to(folder, rank()):
        logger.info(
            "d2scale %s, torch %s, processes: %d, device: %s",
            *(__version__, torch.__version__, world_size(), job.cfg.MODEL.DEVICE),
        )
        for note in job.notes:
            logger.info(note)
        if plan is None:
            return _evaluate_only(job)
        logger.info("the plan:\n%s", plan_table(plan))
        return _train(job, plan)


def _evaluate_only(job: Job) -> Results:
    model = build_model(job.cfg)
    saved = RunCheckpointer(model, job.cfg.OUTPUT_DIR, save_to_disk=False)
    last = saved.get_checkpoint_file() if job.resume else ""
    load_initial_weights(model, last or job.cfg.MODEL.WEIGHTS)
    return evaluate_all(job.cfg, model)


def evaluate_all(cfg: CfgNode, model: nn.Module) -> Results:
    """Evaluate on every dataset of ``DATASETS.TEST``, into ``OUTPUT_DIR/inference``.

    Returns:
        On rank 0 ``bbox/AP`` and so on, with several datasets ``NAME/bbox/AP``; elsewhere
        nothing.
    """
    results: Results = {}
    names = tuple(cfg.DATASETS.TEST)
    for name in names:
        dataset = load_dataset(name, key="DATASETS.TEST")
        loader = build_test_loader(cfg, dataset, world_size=world_size(), rank=rank())
        folder, prefix = Path(cfg.OUTPUT_DIR) / INFERENCE_FOLDER, "bbox/"
        if len(names) > 1:
            folder, prefix = folder / name, f"{name}/bbox/"
        metrics = evaluate(model, dataset, loader, folder, max_dets=cfg.TEST.DETECTIONS_PER_IMAGE)
        if metrics is not None:
            logger.info("evaluation on %s:\n%s", name, format_results(metrics))
            results.update({prefix + key: value for key, value in metrics.items()})
    return results


def _train(job: Job, plan: Plan) -> Results:
    cfg, device = planned_cfg(job.cfg, plan), device_of(job.cfg)
    seed = _agreed_seed(cfg.SEED, device)
    torch.manual_seed(seed)
    model = build_model(cfg)
    if world_size() == 1:
        model = without_synchronised_norms(model)
    step = build_step(cfg, model, ims_per_gpu=plan.ims_per_gpu)
    # Before a checkpoint sets the groups to the rates of its own moment.
    schedule = build_lr_schedule(cfg, step.optimizer)
    others: dict[str, Any] = {} if step.options.scaler is None else {"scaler": step.options.scaler}
    checkpointer = RunCheckpointer(
        model, cfg.OUTPUT_DIR, save_to_disk=rank() == 0, optimizer=step.optimizer, **others
    )
    step.on_split = RecordSplit(plan, checkpointer)
    position = _position(job, cfg, plan, checkpointer, seed)
    broadcast_model(model.train())
    with _build_loader(cfg, position) as data:
        _write_facts(cfg, plan, describe_machine(device))
        trainer = Trainer(
            step,
            data,
            schedule,
            seed=position.seed,
            folder=Path(cfg.OUTPUT_DIR),
            start_iteration=position.next_iteration,
            images_before=position.images_seen,
        )
        return _run(cfg, trainer, model, checkpointer, data, position)


def _position(
    job: Job, cfg: CfgNode, plan: Plan, checkpointer: RunCheckpointer, seed: int
) -> Position:
    """Load the last checkpoint, or the initial weights, and return where the training stands."""
    recipe, position = recipe_of(job.cfg), None
    if job.resume:
        position = Resumer(cfg, plan, recipe, seed).resume(checkpointer)
    if position is None:
        load_initial_weights(checkpointer.model, cfg.MODEL.WEIGHTS)
        position = Position(0, 0, seed, None)
    checkpointer.facts.update(record(plan, recipe, position.seed))
    logger.info("seed %d, first iteration %d", position.seed, position.next_iteration)
    return position


def _write_facts(cfg: CfgNode, plan: Plan, machine: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` and facts: only now is it sure that the run may go on."""
    if rank() != 0:
        return
    folder = Path(cfg.OUTPUT_DIR)
    write_config(folder, cfg)
    write_plan(folder, plan)
    write_machine(folder, machine)


def _run(
    cfg: CfgNode,
    trainer: Trainer,
    model: nn.Module,
    checkpointer: RunCheckpointer,
    data: TrainLoader,
    position: Position,
) -> Results:
    """Train to the end, with everything that happens after a step, and evaluate."""
    max_iter = cfg.SOLVER.MAX_ITER
    with _reporter(cfg, position) as reporter:
        assess = Evaluate(
            partial(evaluate_all, cfg, model),
            reporter,
            period=cfg.TEST.EVAL_PERIOD,
            max_iter=max_iter,
            images_before=position.images_seen,
        )
        save = Save(checkpointer, data, period=cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=max_iter)
        report = Report(reporter, device_of(cfg), period=cfg.WRITER_PERIOD, max_iter=max_iter)
        try:
            trainer.train(max_iter, (save, assess, report))
        except StepDoesNotFitError:
            save.last_step()
            raise
        data.close()
        return assess.now(max_iter - 1)


def _agreed_seed(seed: int, device: torch.device) -> int:
    """Rank 0's seed; drawn by chance if it is negative."""
    agreed = torch.tensor(torch.seed() % 2**31 if seed < 0 else seed, device=device)
    if world_size() > 1:
        dist.broadcast(agreed, 0)
    return int(agreed)


def _build_loader(cfg: CfgNode, position: Position) -> TrainLoader:
    dataset = load_training_dataset(cfg)
    logger.info("training on %d images of %s", len(dataset), dataset.name)
    return build_train_loader(
        cfg,
        dataset,
        world_size=world_size(),
        rank=rank(),
        ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=position.seed,
        start_state=position.sampler,
        exact=cfg.D2SCALE.EXACT,
    )


def _reporter(cfg: CfgNode, position: Position) -> Reporter:
    writers: list[Writer] = []
    first = position.next_iteration
    if rank() == 0:
        folder = Path(cfg.OUTPUT_DIR)
        writers = [
            JsonWriter(folder, first, position.images_seen),
            # Steps of another size have numbers of their own: none is a repetition.
            TensorBoardWriter(folder, first if position.same_steps else 0),
        ]
    return Reporter(
        writers,
        period=cfg.WRITER_PERIOD,
        start_iteration=first,
        max_iter=cfg.SOLVER.MAX_ITER,
        bar=rank() == 0,
    )
