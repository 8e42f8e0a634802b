"""A run of a detectron2 recipe: everything cheap is checked, then the ranks are launched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from d2scale.config.keys import get_key
from d2scale.config.loading import flatten
from d2scale.config.own_datasets import make_paths_absolute
from d2scale.config.upstream import is_lazy_config
from d2scale.detectron2.checks import (
    beginning_faults,
    dataset_faults,
    lazy_dataset_faults,
    model_faults,
    norm_faults,
)
from d2scale.detectron2.config import load_cfg
from d2scale.detectron2.datasets import annotation_digests, register_datasets
from d2scale.detectron2.last_checkpoint import last_whole_checkpoint, reading
from d2scale.detectron2.lazy_config import (
    FOR_EVALUATION,
    FOR_TRAINING,
    lazy_names,
    load_lazy_config,
    read_lazy_recipe,
)
from d2scale.detectron2.lazy_nodes import node_faults
from d2scale.detectron2.lazy_training import build_model, evaluate_lazy, train_lazy
from d2scale.detectron2.private_upstream import WholeCheckpointer, join_local_group
from d2scale.detectron2.scaling import refuse_unplannable, warn_without_effect
from d2scale.detectron2.trainer import RecipeTrainer
from d2scale.detectron2.training import Scaling
from d2scale.detectron2.user_errors import exit_together_on_user_error, faults_of_building
from d2scale.errors import ConfigError, Fault, collecting
from d2scale.launch.comparison import refuse_different_ranks
from d2scale.launch.elastic import may_start_anew, refuse_separate_folders, store_faults
from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology, under_torchrun
from d2scale.launch.workers import telling_of_lost_workers
from d2scale.planning.virtual_ranks import ModelFacts
from d2scale.run_folder.contents import holds_run
from d2scale.run_folder.files import folder_faults, make_folder
from d2scale.run_folder.lock import refuse_locked, run_lock
from d2scale.run_folder.shortages import let_log_calmly, telling_of_shortages
from d2scale.step import ranks

logger = logging.getLogger(__name__)

_MOST_EARLY_LINES = 10_000
_WITHOUT_EFFECT = {
    "TEST.AUG.ENABLED": "it evaluates each image once, as it is",
    "D2SCALE.TILES.SIZE": "only the default engine evaluates in tiles",
}

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What the command line asks for; every rank reads the recipe itself."""

    config_file: str
    opts: tuple[str, ...]  # KEY VALUE pairs, of a LazyConfig key=value
    local_ranks: int  # processes on each machine
    method: str | None = None
    resume: bool = False
    eval_only: bool = False

    @property
    def is_lazy(self) -> bool:
        """Whether the recipe is a LazyConfig, which is code."""
        return is_lazy_config(self.config_file)

    def load(self) -> Any:
        """Return the recipe, for a CPU where CUDA is not available; ConfigError with all faults."""
        cuda = torch.cuda.is_available()
        if self.is_lazy:
            lazy = load_lazy_config(self.config_file, self.opts)
            # It refuses what cannot be trained.
            read_lazy_recipe(lazy, FOR_EVALUATION if self.eval_only else FOR_TRAINING)
            if not cuda:
                lazy.train.device, lazy.train.amp.enabled = "cpu", False
            return lazy
        cfg = load_cfg(self.config_file, self.opts)
        make_paths_absolute(cfg)  # for who reads config.yaml in another folder
        if not cuda:
            cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
        cfg.freeze()
        return cfg


def train(job: Job, topology: Topology) -> Results:
    """Train a recipe of detectron2, or evaluate its weights; return rank 0's last metrics.

    Raises:
        ConfigError: with every fault of the config, its datasets and its folder, before anything
            is written.
        D2ScaleError: for what goes wrong later and the user can mend.
        SystemExit: after a mistake that a rank has told.
    """
    if may_start_anew() and not job.eval_only:
        job = Job(**{**vars(job), "resume": True})
    with lazy_names() if job.is_lazy else nullcontext():
        _check(job, topology)
    results: Results = launch(run_rank, [job], topology, use_cuda=torch.cuda.is_available())
    return results


def _check(job: Job, topology: Topology) -> None:
    cfg = job.load()
    recipe, settings = read_lazy_recipe(cfg) if job.is_lazy else (cfg, dict(flatten(cfg)))
    folder = Path(recipe.OUTPUT_DIR)
    on_cuda = torch.cuda.is_available()
    faults = topology.faults(torch.cuda.device_count() if on_cuda else None) + store_faults()
    wrong_processes = bool(faults)
    if not (job.resume or job.eval_only) and holds_run(folder):
        allowed = "a folder without the checkpoints of another run"
        advice = "add --resume to go on with that run, or choose another folder"
        faults.append(Fault("OUTPUT_DIR", str(folder), allowed, advice))
    faults += folder_faults(folder)
    # Under torchrun a sister rank may hold the lock already: the first rank itself takes it.
    if not job.eval_only and not under_torchrun():
        with collecting(faults):
            refuse_locked(folder)
    if job.is_lazy:
        faults += [*node_faults(cfg), *lazy_dataset_faults(cfg, eval_only=job.eval_only)]
    else:
        faults += dataset_faults(cfg, eval_only=job.eval_only)
    faults += _model_faults(job, recipe, settings, topology.world_size)
    if not job.eval_only and not wrong_processes:
        with collecting(faults):
            facts = ModelFacts.of_recipe(recipe, settings)
            refuse_unplannable(recipe, topology.world_size, job.method, "detectron2", facts)
    if faults:
        raise ConfigError(faults)


def _model_faults(
    job: Job, recipe: Any, settings: Mapping[str, Any], world_size: int
) -> list[Fault]:
    faults = [] if job.is_lazy else model_faults(recipe)
    weights, folder = recipe.MODEL.WEIGHTS, Path(recipe.OUTPUT_DIR)
    faults += beginning_faults(weights, folder, resume=job.resume, eval_only=job.eval_only)
    if not job.eval_only and not torch.cuda.is_available():
        faults += norm_faults(settings, world_size)
    return faults


def run_rank(job: Job) -> Results:
    """Train and evaluate, or only evaluate, on this rank; return the last metrics."""
    join_local_group(job.local_ranks)
    cfg = job.load()
    recipe, settings = read_lazy_recipe(cfg) if job.is_lazy else (cfg, dict(flatten(cfg)))
    options = {"--method": job.method, "--resume": job.resume, "--eval-only": job.eval_only}
    with exit_together_on_user_error():
        refuse_different_ranks(settings, annotation_digests(cfg), options)
    _log_to(None)
    if not torch.cuda.is_available():
        logger.info("CUDA is not available: running on the CPU, in float32")
    # Other numbers on each rank, as detectron2 has it; virtual ranks have streams of their own.
    seed_all_rng(None if recipe.SEED < 0 else recipe.SEED + ranks.rank())
    torch.backends.cudnn.benchmark = get_key(recipe, "CUDNN_BENCHMARK", False)
    folder = Path(recipe.OUTPUT_DIR)
    warn_without_effect(recipe, _WITHOUT_EFFECT, "d2scale train")
    if job.eval_only:
        return _evaluate(job, cfg, folder)
    scaling = Scaling(cfg, job.method)
    with _writing_to(folder, locks=True):
        if job.is_lazy:
            return train_lazy(scaling, resume=job.resume)
        with exit_together_on_user_error():
            register_datasets(scaling.cfg)
        with faults_of_building("config file", job.config_file):
            trainer = RecipeTrainer(scaling)
        trainer.resume_or_load(resume=job.resume)
        trainer.train()
        return getattr(trainer, "_last_eval_results", None) or {}


def _evaluate(job: Job, cfg: Any, folder: Path) -> Results:
    build: Callable[[Any], Any] = build_model if job.is_lazy else RecipeTrainer.build_model
    if not job.is_lazy:
        with exit_together_on_user_error():
            register_datasets(cfg)
    with faults_of_building("config file", job.config_file):
        model = build(cfg)
    with _writing_to(folder, locks=False):
        weights = cfg.train.get("init_checkpoint") if job.is_lazy else cfg.MODEL.WEIGHTS
        last = last_whole_checkpoint(folder) if job.resume else None
        with exit_together_on_user_error(), reading(f"{last or weights}"):
            WholeCheckpointer(model).load(str(last or weights), checkpointables=[])
        if job.is_lazy:
            return evaluate_lazy(cfg, model)
        results: Results = RecipeTrainer.test(cfg, model)
        return results


@contextmanager
def _writing_to(folder: Path, *, locks: bool) -> Iterator[None]:
    """Within the context, log to the folder, which is locked if asked to."""
    make_folder(folder)
    with (
        telling_of_shortages(folder),
        telling_of_lost_workers(),
        run_lock(folder) if locks and ranks.rank() == 0 else nullcontext(),
    ):
        _log_to(folder)
        if locks:
            with exit_together_on_user_error():
                refuse_separate_folders(folder)
        logger.info("Environment:\n%s", collect_env_info())
        yield


def _log_to(folder: Path | None) -> None:
    """Write log lines to the terminal, or to ``log.txt`` in ``folder`` as well.

    There d2scale's earlier lines come first: the plan is older than the folder.
    """
    own = logging.getLogger("d2scale")
    earlier = [handler for handler in own.handlers if isinstance(handler, MemoryHandler)]
    for handler in earlier:
        own.removeHandler(handler)
    names: Sequence[str] = ("detectron2", "fvcore", "d2scale")
    for name in names:
        setup_logger(
            None if folder is None else str(folder),
            ranks.rank(),
            name=name,
            configure_stdout=folder is None,
        )
        let_log_calmly(name)
    if folder is None:
        own.addHandler(MemoryHandler(_MOST_EARLY_LINES, flushLevel=logging.CRITICAL + 1))
        return
    for handler in earlier:
        handler.setTarget(own.handlers[-1])  # of the file
        handler.close()
