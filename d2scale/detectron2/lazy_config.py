"""Read a detectron2 LazyConfig as the recipe that planning knows, and write a plan into one.

A LazyConfig names what a YAML recipe has under other keys, and its schedule in parts of the whole
training: ``lr_multiplier`` is the same for any number of iterations, so a plan leaves it alone.
What only d2scale reads stands in a node of its own, with the names of the ``D2SCALE`` keys::

    d2scale = dict(reference_world_size=64, method="max_memory", lr_rule="linear")
"""

from __future__ import annotations

import builtins
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.keys import as_json
from d2scale.config.loading import flatten, recipe_from_settings, resolve_config_path
from d2scale.config.upstream import INSTALL_DETECTRON2
from d2scale.config.value_rules import is_number
from d2scale.errors import ConfigError, Fault, MissingPackageError
from d2scale.planning.methods import METHOD_NAMES, METHOD_PREFIX
from d2scale.planning.plan import Plan

# The node with d2scale's own options.
NODE = "d2scale"

_TOTAL_BATCH = "dataloader.train.total_batch_size"
_REQUIRED = {
    "SOLVER.IMS_PER_BATCH": _TOTAL_BATCH,
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.MAX_ITER": "train.max_iter",
}
_OPTIONAL = {
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.MOMENTUM": "optimizer.momentum",
    "SEED": "train.seed",
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DDP_FIND_UNUSED_PARAMETERS": "train.ddp.find_unused_parameters",
    "SOLVER.REFERENCE_WORLD_SIZE": f"{NODE}.reference_world_size",
}
_NAMES = {**_REQUIRED, **_OPTIONAL}
# What is taken from a LazyConfig besides what a plan needs.
FOR_EVALUATION = ("model", "train.amp.enabled", "train.device", "train.output_dir")
FOR_TRAINING = (
    *(*FOR_EVALUATION, "optimizer", "lr_multiplier", "dataloader.train"),
    *("train.checkpointer.period", "train.eval_period", "train.log_period"),
)
FOR_MEMORY = ("model", "optimizer", "dataloader.train.dataset", "dataloader.train.mapper")
# In parts of the training in a LazyConfig, so that no plan changes them.
_IN_PARTS = {"SOLVER.STEPS": "lr_multiplier", "SOLVER.WARMUP_ITERS": "lr_multiplier"}
# Of a model and its input: what its memory depends on.
_NODES_OF_MEMORY = ("model", "dataloader.train.mapper")
_ABSENT = object()


def load_lazy_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Run a LazyConfig's ``.py`` file and return it, a DictConfig, with ``key=value`` overrides.

    The file is code: call this only with what the user names.

    Raises:
        ConfigError: for a file that is not there or raises, or an override that cannot be applied.
        MissingPackageError: without detectron2.
    """
    try:
        from detectron2.config import LazyConfig

        from d2scale.detectron2.lazy_nodes import override_faults
    except ModuleNotFoundError as error:
        needed_for = f"the LazyConfig {path}"
        raise MissingPackageError(str(error.name), needed_for, INSTALL_DETECTRON2) from error
    resolved = resolve_config_path(path)
    with _faults_of_code("config file", path, "a LazyConfig that detectron2 can load"):
        cfg = LazyConfig.load(resolved)
    with _faults_of_code("overrides", " ".join(overrides), "key=value, as detectron2 has them"):
        if faults := override_faults(cfg, overrides):
            raise ConfigError(faults)
        return LazyConfig.apply_overrides(cfg, list(overrides))


@contextmanager
def _faults_of_code(key: str, value: str, allowed: str) -> Iterator[None]:
    """Make one line of whatever is raised within the context, which may be anything."""
    import_function = builtins.__import__
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        advice = f"mend it: {type(error).__name__}: {reason}"
        raise ConfigError([Fault(key, value, allowed, advice)]) from error
    finally:
        # detectron2 puts its own in its place and leaves it there if the file raises.
        builtins.__import__ = import_function


def read_lazy_recipe(cfg: Any, needed: Sequence[str] = ()) -> tuple[CfgNode, dict[str, Any]]:
    """Return a LazyConfig as planning, coverage and progress know a recipe.

    Returned are, as by ``load_recipe``, a config with the recipe's batch, rate, iterations, AMP and
    D2SCALE options under their YAML names, and its own settings by dotted key, among them those of
    ``model`` and ``dataloader.train.mapper``, as JSON values. N0 is
    ``d2scale.reference_world_size``, or what a YAML recipe means that leaves
    SOLVER.REFERENCE_WORLD_SIZE out. ``needed`` are keys that it must have as well.

    Raises:
        ConfigError: with all faults, by the names of the LazyConfig.
    """
    settings = {name: _select(cfg, key) for name, key in _NAMES.items()}
    settings = {name: v for name, v in settings.items() if v is not _ABSENT and v is not None}
    absent = [key for name, key in _REQUIRED.items() if name not in settings]
    _refuse_missing(cfg, [*absent, *(key for key in needed if _is_missing(cfg, key))])
    for name in ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"):
        value = settings.get(name)
        settings |= {name: int(value)} if isinstance(value, float) and value.is_integer() else {}
    settings["SOLVER.OPTIMIZER"] = _plain(_select(cfg, "optimizer._target_")).rpartition(".")[2]
    settings["SOLVER.OPTIMIZER"] = settings["SOLVER.OPTIMIZER"].lower()
    if is_number(settings["SOLVER.MAX_ITER"]):
        with _faults_of_code("lr_multiplier", "", "a schedule whose parts are numbers"):
            settings |= _schedule(cfg, settings["SOLVER.MAX_ITER"])
    settings |= _options(cfg)
    with lazy_names():
        recipe = recipe_from_settings(settings)
    # Nothing averages or quantizes weights there.
    del recipe["QUANTIZATION"], recipe["MODEL_EMA"]
    nodes = {node: _select(cfg, node) for node in _NODES_OF_MEMORY}
    settings |= flatten({node: _plain(v) for node, v in nodes.items() if v is not _ABSENT})
    return recipe, settings


def _is_missing(cfg: Any, key: str) -> bool:
    """Return whether nothing is at ``key``, or a plain value that nothing can be built of."""
    value = _select(cfg, key, None)
    return value is None or (not key.startswith("train.") and isinstance(value, str | int | float))


def _refuse_missing(cfg: Any, keys: Sequence[str]) -> None:
    allowed, advice = "a value, in a LazyConfig that trains", "give one; d2scale needs it"
    values = {key: _plain(_select(cfg, key, None)) for key in keys}
    if values:
        raise ConfigError([Fault(key, value, allowed, advice) for key, value in values.items()])


def _schedule(cfg: Any, max_iter: Any) -> dict[str, Any]:
    """Return warm-up and drops of ``lr_multiplier`` in iterations, rounded."""
    warmup = _select(cfg, "lr_multiplier.warmup_length", 0)
    inner = "lr_multiplier.scheduler" if warmup else "lr_multiplier"
    milestones = list(_select(cfg, f"{inner}.milestones", ()) or ())
    whole = _select(cfg, f"{inner}.num_updates", None)
    if whole is None and milestones:  # as MultiStepParamScheduler has it
        *milestones, whole = milestones
    steps = tuple(round(step / whole * max_iter) for step in milestones)
    name = "WarmupMultiStepLR" if milestones else "WarmupCosineLR"
    return {
        "SOLVER.WARMUP_ITERS": round(warmup * max_iter),
        "SOLVER.STEPS": steps,
        "SOLVER.LR_SCHEDULER_NAME": name,
    }


def _options(cfg: Any) -> dict[str, Any]:
    """Return what the node ``d2scale`` sets, by config key."""
    node = _plain(_select(cfg, NODE, {})) or {}
    if not isinstance(node, Mapping):
        raise ConfigError([Fault(NODE, node, "dict(...)", "give its keys, or leave it out")])
    options = {k.upper(): v for k, v in flatten(node)}
    options.pop("REFERENCE_WORLD_SIZE", None)
    method = options.pop("METHOD", None)
    named = {} if method is None else {METHOD_NAMES.key: (f"{METHOD_PREFIX}{method}",)}
    return {**{f"D2SCALE.{key}": value for key, value in options.items()}, **named}


def apply_plan(cfg: Any, plan: Plan) -> Any:
    """Return a copy of a LazyConfig with the planned values; ``lr_multiplier`` needs none.

    Before, for 8 GPUs::

        dataloader.train.total_batch_size = 16
        optimizer.lr = 0.02
        train.max_iter = 90000

    After ``per_gpu`` on one GPU::

        dataloader.train.total_batch_size = 2
        optimizer.lr = 0.0025
        train.max_iter = 720000
        d2scale.reference_world_size = 1
    """
    from omegaconf import OmegaConf

    planned = copy.deepcopy(cfg)
    for key, (_, value) in in_lazy_names(plan).changes.items():
        if key.startswith(f"{NODE}.") or _select(cfg, key) is not _ABSENT:
            OmegaConf.update(planned, key, value, force_add=True)
    return planned


def in_lazy_names(plan: Plan) -> Plan:
    """Return a plan to show: its changes by the keys of a LazyConfig, without what stays there."""
    changes = {_lazy_name(key): pair for key, pair in plan.changes.items() if key not in _IN_PARTS}
    return replace(plan, changes=changes)


@contextmanager
def lazy_names() -> Iterator[None]:
    """Within the context, faults name the keys of a LazyConfig instead of those of YAML."""
    try:
        yield
    except ConfigError as error:
        raise type(error)([_renamed(fault) for fault in error.faults]) from error


def _renamed(fault: Fault) -> Fault:
    allowed, advice = (
        re.sub(r"[A-Z][A-Z0-9]+(\.[A-Z_]+)+", lambda name: _lazy_name(name[0]), text)
        for text in (fault.allowed, fault.advice)
    )
    return Fault(_lazy_name(fault.key), fault.value, allowed, advice)


def _lazy_name(key: str) -> str:
    """Return what a LazyConfig calls a config key."""
    if key.startswith("D2SCALE."):
        return key.lower()
    return {**_NAMES, **_IN_PARTS}.get(key, key)


def _select(cfg: Any, key: str, default: Any = _ABSENT) -> Any:
    """Return the value of a dotted ``key``, ``default`` if it is not there or has no value yet."""
    from omegaconf import OmegaConf

    with _faults_of_code(key, "", "a value that can be resolved"):
        return OmegaConf.select(cfg, key, default=default)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON would bring it back; what is called or built is its name."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return as_json(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
