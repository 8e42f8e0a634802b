"""What one rank of a run does: plan with the others, build everything, train, evaluate."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import nn

from d2scale import __version__
from d2scale.coco.dataset import load_training_dataset
from d2scale.coco.digests import DataFacts
from d2scale.config.loading import flatten
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.files import last_whole_checkpoint
from d2scale.engine.checkpoint.resume import Position, RunRecord, resume_training
from d2scale.engine.data.loader import TrainLoader, build_train_loader
from d2scale.engine.evaluation import evaluate_datasets
from d2scale.engine.hooks import CheckpointHook, EvaluationHook
from d2scale.engine.models import build_model, device_of, load_initial_weights
from d2scale.engine.planning import plan_on_ranks, planned_cfg
from d2scale.engine.solver import LearningRateSchedule, build_lr_schedule
from d2scale.engine.step import build_step
from d2scale.engine.telemetry.logs import logging_to
from d2scale.engine.telemetry.machine import describe_machine
from d2scale.engine.telemetry.reporter import Reporter
from d2scale.engine.telemetry.writers import JsonWriter, TensorBoardWriter, Writer
from d2scale.engine.trainer import Trainer
from d2scale.launch.comparison import refuse_different_ranks
from d2scale.launch.elastic import refuse_separate_folders
from d2scale.launch.workers import telling_of_lost_workers
from d2scale.memory.devices import hold_to_budget
from d2scale.planning.formats import plan_table
from d2scale.planning.plan import Plan
from d2scale.planning.progress import recipe_of
from d2scale.run_folder.contents import write_config, write_machine, write_plan
from d2scale.run_folder.files import make_folder
from d2scale.run_folder.lock import run_lock
from d2scale.run_folder.shortages import telling_of_shortages
from d2scale.step import ranks
from d2scale.step.clock import StepClock, build_clock
from d2scale.step.guard import StepDoesNotFitError
from d2scale.step.norms import synchronise_norms
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.virtual_ranks import VirtualRanks

logger = logging.getLogger(__name__)

Results = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What a run was asked for. Every rank has one, and all must agree."""

    cfg: CfgNode  # the recipe, for this machine
    method: str | None  # a scaling method; None: the one of the recipe
    resume: bool  # go on from the last checkpoint in the run's folder, if there is one
    eval_only: bool  # evaluate and stop
    data: DataFacts
    notes: tuple[str, ...] = ()  # for the log: what was decided before the log began

    def refuse_differences(self) -> None:
        """Raise a ConfigError on all ranks if some rank has another job than the first."""
        options = {
            "--method": self.method,
            "--resume": self.resume,
            "--eval-only": self.eval_only,
        }
        refuse_different_ranks(dict(flatten(self.cfg)), self.data.digests, options)


def run_rank(job: Job) -> Results:
    """Plan, train and evaluate, or only evaluate, on this rank.

    The log begins when there is a plan; other files are written when the checkpoint to resume
    from has been loaded. Raises D2ScaleError for what the user can mend.

    Returns:
        The metrics of the last evaluation, under the names that ``metrics.json`` uses; empty
        without ``DATASETS.TEST``, and on all ranks but the first.
    """
    job.refuse_differences()
    plan = None if job.eval_only else plan_on_ranks(job.cfg, job.method, job.data.images)
    folder = Path(job.cfg.OUTPUT_DIR)
    make_folder(folder)
    locks = plan is not None and ranks.rank() == 0
    with (
        telling_of_shortages(folder),
        run_lock(folder) if locks else nullcontext(),
        logging_to(folder, ranks.rank()),
        telling_of_lost_workers(),
    ):
        logger.info(
            "d2scale %s, torch %s, processes: %d, device: %s",
            *(__version__, torch.__version__, ranks.world_size(), job.cfg.MODEL.DEVICE),
        )
        for note in job.notes:
            logger.info(note)
        return _evaluate_only(job) if plan is None else _train(job, plan)


def _evaluate_only(job: Job) -> Results:
    model = build_model(job.cfg)
    last = last_whole_checkpoint(Path(job.cfg.OUTPUT_DIR)) if job.resume else None
    load_initial_weights(model, str(last[0]) if last else job.cfg.MODEL.WEIGHTS)
    return evaluate_datasets(job.cfg, model)


class _Training(NamedTuple):
    """A training that is ready to begin or to go on."""

    cfg: CfgNode
    step: OptimizerStep
    schedule: LearningRateSchedule
    checkpointer: RunCheckpointer
    position: Position
    clock: StepClock
    plan: Plan  # with the images per GPU that are known to fit


def _train(job: Job, plan: Plan) -> Results:
    refuse_separate_folders(Path(job.cfg.OUTPUT_DIR))
    logger.info("the plan:\n%s", plan_table(plan))
    hold_to_budget(device_of(job.cfg), job.cfg.D2SCALE.MEMORY.BUDGET_GIB)
    training = _prepare(job, plan)
    cfg, position, plan = training.cfg, training.position, training.plan
    with _open_loader(cfg, plan, position) as loader, _open_reporter(cfg, position) as reporter:
        _write_facts(cfg, plan)
        return _train_and_evaluate(training, loader, reporter)


def _prepare(job: Job, plan: Plan) -> _Training:
    """Build the model and its optimizer step; load the last checkpoint or the initial weights."""
    cfg = planned_cfg(job.cfg, plan)
    seed = ranks.broadcast_object(torch.seed() % 2**31 if cfg.SEED < 0 else cfg.SEED)
    torch.manual_seed(seed)
    model = synchronise_norms(build_model(cfg).train(), plan.sync_bn)
    virtual_ranks = _virtual_ranks(cfg, plan, model, seed)
    step = build_step(cfg, model, ims_per_gpu=plan.ims_per_gpu, virtual_ranks=virtual_ranks)
    # Before a checkpoint sets the groups to the rates of its own moment.
    schedule = build_lr_schedule(cfg, step.optimizer)
    checkpointer = RunCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        writes=ranks.rank() == 0,
        optimizer=step.optimizer,
        scaler=step.options.scaler,
        virtual_ranks=virtual_ranks,
        micro_batches=step.size,
    )
    recipe, position = recipe_of(job.cfg), None
    if job.resume:
        position = resume_training(checkpointer, cfg, plan, recipe, seed)
    if position is None:
        load_initial_weights(model, cfg.MODEL.WEIGHTS)
        position = Position(iterations=0, images_seen=0, recipe_images=0, seed=seed)
    logger.info("seed %d, first iteration %d", position.seed, position.next_iteration)
    if virtual_ranks is not None:
        virtual_ranks.seed = position.seed
    record = RunRecord(checkpointer, plan, recipe, position.seed)
    plan = record.plan = plan.with_micro_batches_of(step.ims_per_gpu)
    step.on_new_size = record.record_size
    ranks.broadcast_model(model)
    clock = build_clock(cfg)
    clock.resume(position.iterations, position.recipe_images, position.clock)
    return _Training(cfg, step, schedule, checkpointer, position, clock, plan)


def _virtual_ranks(cfg: CfgNode, plan: Plan, model: nn.Module, seed: int) -> VirtualRanks | None:
    if not plan.virtual_ranks:
        return None
    refuses = cfg.D2SCALE.VIRTUAL_RANKS == "on"
    ordered = cfg.D2SCALE.ORDERED_SUM
    return VirtualRanks(model, plan.virtual_ranks, seed, ordered=ordered, refuses=refuses)


def _open_loader(cfg: CfgNode, plan: Plan, position: Position) -> TrainLoader:
    dataset = load_training_dataset(cfg)
    logger.info("training on %d images of %s", len(dataset), dataset.name)
    return build_train_loader(
        cfg,
        dataset,
        world_size=ranks.world_size(),
        rank=ranks.rank(),
        ims_per_batch=cfg.SOLVER.IMS_PER_BATCH,
        seed=position.seed,
        start_state=position.sampler,
        exact=cfg.D2SCALE.EXACT,
        virtual_ranks=plan.virtual_ranks,
    )


def _open_reporter(cfg: CfgNode, position: Position) -> Reporter:
    writers: list[Writer] = []
    first = position.next_iteration
    if ranks.rank() == 0:
        folder = Path(cfg.OUTPUT_DIR)
        writers = [
            JsonWriter(folder, first, position.images_seen),
            # Steps of another size have numbers of their own: none is a repetition.
            TensorBoardWriter(folder, first if position.same_steps else 0),
        ]
    return Reporter(
        writers,
        device_of(cfg),
        period=cfg.WRITER_PERIOD,
        start_iteration=first,
        max_iter=cfg.SOLVER.MAX_ITER,
        bar=ranks.rank() == 0,
    )


def _write_facts(cfg: CfgNode, plan: Plan) -> None:
    """Write ``config.yaml``, ``plan.json`` and ``machine.json``: now the run may go on."""
    machine = describe_machine(device_of(cfg))
    if ranks.rank() == 0:
        folder = Path(cfg.OUTPUT_DIR)
        write_config(folder, cfg)
        write_plan(folder, plan)
        write_machine(folder, machine)


def _train_and_evaluate(training: _Training, loader: TrainLoader, reporter: Reporter) -> Results:
    cfg, step, schedule, checkpointer, position, clock, _ = training
    max_iter = cfg.SOLVER.MAX_ITER
    trainer = Trainer(
        step,
        loader,
        schedule,
        seed=position.seed,
        folder=checkpointer.folder,
        clock=clock,
        images_before=position.images_seen,
    )
    checkpoints = CheckpointHook(
        checkpointer, loader, clock, period=cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=max_iter
    )
    evaluation = EvaluationHook(
        partial(_evaluate, cfg, step),
        reporter,
        period=cfg.TEST.EVAL_PERIOD,
        max_iter=max_iter,
    )
    try:
        trainer.train(max_iter, (checkpoints, evaluation, reporter))
    except StepDoesNotFitError:
        checkpoints.save()
        raise
    checkpoints.finish(position.checkpoint, trainer.images_seen)
    loader.close()
    return evaluation.evaluate(max_iter - 1, trainer.images_seen)


def _evaluate(cfg: CfgNode, step: OptimizerStep) -> Results:
    # Every rank judges its share of the images with what a checkpoint holds.
    with step.state_of_first_rank():
        return evaluate_datasets(cfg, step.model)
