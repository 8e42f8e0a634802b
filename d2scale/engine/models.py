"""Build models by name, on the run's device, and load their initial weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from d2scale.coco.class_count import class_count_faults, with_class_count
from d2scale.config.class_count import class_count_key
from d2scale.config.projects import entry_points
from d2scale.engine.activations import apply_activation_checkpointing
from d2scale.engine.checkpoint.files import mismatches, read_checkpoint
from d2scale.engine.checkpoint.weights import find_weights
from d2scale.errors import CheckpointError, ConfigError, Fault
from d2scale.planning.virtual_ranks import MODELS, SYNCHRONISED, ModelFacts
from d2scale.step.micro_batches import ExactModel
from d2scale.step.norms import plain_norms, synchronised_norms

logger = logging.getLogger(__name__)

Builder = Callable[[CfgNode], nn.Module]


def find_builder(name: str) -> Builder:
    """Return the function that builds the model which ``MODEL.META_ARCHITECTURE`` names.

    Raises ConfigError, which lists the models that are offered, if no installed package has it.
    """
    offered = {entry.name: entry for entry in entry_points(group=MODELS)}
    if name not in offered:
        allowed = ", ".join(sorted(offered)) or "none, for no installed package offers a model"
        advice = f"install a package that offers it as an entry point {MODELS}"
        raise ConfigError([Fault("MODEL.META_ARCHITECTURE", name, allowed, advice)])
    builder: Builder = offered[name].load()
    return builder


def check_model(cfg: CfgNode) -> None:
    """Build the model on the meta device, to find out what is wrong with its keys.

    Raises ConfigError from the model's package, or for a model that has other classes than the
    datasets.
    """
    find_builder(cfg.MODEL.META_ARCHITECTURE)
    # A dataset that does not tell its classes is a fault of its own.
    cfg = with_class_count(cfg, unknown=1)
    try:
        with _quiet(), torch.device("meta"):
            model = new_model(cfg)
    except (NotImplementedError, RuntimeError):
        # Not every model can be built without memory; then the ranks are the first to raise.
        return
    if faults := _class_faults(cfg, model):
        raise ConfigError(faults)


def check_weights(cfg: CfgNode) -> None:
    """Raise the CheckpointError that :func:`load_initial_weights` will raise; nothing is kept."""
    if cfg.MODEL.WEIGHTS:
        with _quiet():
            load_initial_weights(new_model(cfg), cfg.MODEL.WEIGHTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing: what a model logs belongs into the run's log, when the ranks build it."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def model_facts(cfg: CfgNode) -> ModelFacts:
    """Return what planning needs to know of the config's model; it is built without memory."""
    try:
        with torch.device("meta"):
            model = new_model(cfg)
    except (NotImplementedError, RuntimeError, ConfigError):
        # Faults of the model are told where it is checked, together with all others.
        return ModelFacts.of_recipe(cfg)
    obstacle = SYNCHRONISED if synchronised_norms(model) else ""
    return ModelFacts(isinstance(model, ExactModel), obstacle, bool(plain_norms(model)))


def _class_faults(cfg: CfgNode, model: nn.Module) -> list[Fault]:
    """Compare a model's ``num_classes``, if it has that attribute, with the datasets'."""
    classes = getattr(model, "num_classes", None)
    if classes is None:
        return []
    key, advice = class_count_key(cfg), "leave it out, and it follows the dataset"
    if key is None:
        key, advice = "number of classes of the model", "set the model's NUM_CLASSES to it"
    return class_count_faults(cfg, key, classes, advice=advice)


def precision_of(cfg: CfgNode) -> torch.dtype | None:
    """Return the 16-bit type of ``SOLVER.AMP``, None without it."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    return torch.float16 if cfg.SOLVER.AMP.PRECISION == "float16" else torch.bfloat16


def device_of(cfg: CfgNode) -> torch.device:
    """Return this rank's device."""
    if cfg.MODEL.DEVICE == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def new_model(cfg: CfgNode) -> nn.Module:
    """Build the model with random weights, on torch's default device.

    Raises ConfigError from the model's package, or for a switch that the model does not offer.
    """
    model = find_builder(cfg.MODEL.META_ARCHITECTURE)(with_class_count(cfg))
    if cfg.D2SCALE.ACTIVATION_CHECKPOINTING:
        apply_activation_checkpointing(model)
    return model


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model on this rank's device, with random weights."""
    return new_model(cfg).to(device_of(cfg))


def load_initial_weights(model: nn.Module, name: str) -> None:
    """Load what ``MODEL.WEIGHTS`` names; nothing if it is empty.

    A model with a method ``load_weights(path)`` does it itself. Of any other, the names and
    shapes in the file must be the model's own. Raises CheckpointError if the file is not there,
    broken, or of another model.
    """
    if not name:
        return
    path = find_weights(name)
    own_loader: Callable[[Path], object] | None = getattr(model, "load_weights", None)
    if own_loader is not None:
        own_loader(path)
        return
    weights = read_checkpoint(path)["model"]
    if faults := mismatches(path, weights, model.state_dict()):
        raise CheckpointError(faults)
    model.load_state_dict(weights)
    logger.info("loaded %d tensors from %s", len(weights), path)
