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
from d2scale.engine.actions import Evaluate, Report, Save
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.resume import Position, Resumer, record
from d2scale.engine.data.loader import TrainLoader, build_test_loader, build_train_loader
from d2scale.engine.evaluation import evaluate, format_results
from d2scale.engine.models import build_model, device_of, load_initial_weights
from d2scale.engine.solver import build_lr_schedule
from d2scale.engine.splitting import RecordSplit
from d2scale.engine.step import build_step
from d2scale.engine.telemetry.logs import logging_to
from d2scale.engine.telemetry.machine import describe_machine
from d2scale.engine.telemetry.writers import JsonWriter, Reporter, TensorBoardWriter, Writer
from d2scale.engine.trainer import Trainer
from d2scale.planning.formats import to_table
from d2scale.planning.plan import Plan
from d2scale.run_folder.contents import write_config, write_machine, write_plan
from d2scale.run_folder.files import INFERENCE_FOLDER
from d2scale.run_folder.lock import run_lock
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.ranks import broadcast_model, rank, world_size

logger = logging.getLogger(__name__)

Results = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What the parent process hands to its ranks.

    Attributes:
        cfg: the config to run, planned.
        recipe: ``recipe_of`` the config as it was before planning.
        plan: what was decided; None when the run only evaluates.
        resume: go on from the last checkpoint in the run's folder, if there is one.
        notes: lines for the log about what was decided before the log began.
    """

    cfg: CfgNode
    recipe: Mapping[str, Any]
    plan: Plan | None
    resume: bool
    notes: tuple[str, ...] = ()


def run_rank(job: Job) -> Results:
    """Train and evaluate, or only evaluate, on this rank.

    Returns:
        The metrics of the last evaluation, under the names that ``metrics.json`` uses; empty
        without ``DATASETS.TEST``, and on all ranks but the first.

    Raises:
        D2ScaleError: for what the user can mend.
    """
    folder = Path(job.cfg.OUTPUT_DIR)
    writes = job.plan is not None and rank() == 0
    with run_lock(folder) if writes else nullcontext(), logging_to(folder, rank()):
        logger.info(
            "d2scale %s, torch %s, processes: %d, device: %s",
            *(__version__, torch.__version__, world_size(), job.cfg.MODEL.DEVICE),
        )
        for note in job.notes:
            logger.info(note)
        if job.plan is None:
            return _evaluate_only(job)
        logger.info("the plan:\n%s", to_table(job.plan))
        return _train(job, job.plan)


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
    cfg, device = job.cfg, device_of(job.cfg)
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
    position = _position(job, plan, checkpointer, seed)
    broadcast_model(model.train())
    with _build_loader(cfg, position) as data:
        _write_facts(job, plan, describe_machine(device))
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


def _position(job: Job, plan: Plan, checkpointer: RunCheckpointer, seed: int) -> Position:
    """Load the last checkpoint, or the initial weights, and return where the training stands."""
    position = None
    if job.resume:
        position = Resumer(job.cfg, plan, job.recipe, seed).resume(checkpointer)
    if position is None:
        load_initial_weights(checkpointer.model, job.cfg.MODEL.WEIGHTS)
        position = Position(0, 0, seed, None)
    checkpointer.facts.update(record(plan, job.recipe, position.seed))
    logger.info("seed %d, first iteration %d", position.seed, position.next_iteration)
    return position


def _write_facts(job: Job, plan: Plan, machine: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` and facts: only now is it sure that the run may go on."""
    if rank() != 0:
        return
    folder = Path(job.cfg.OUTPUT_DIR)
    write_config(folder, job.cfg)
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
