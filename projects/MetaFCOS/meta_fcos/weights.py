"""Loading published weights: detectron2's ``.pkl`` zoo files and ``.pth`` checkpoints."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from d2scale.engine.checkpoint.files import fits
from d2scale.errors import CheckpointError, Fault
from d2scale.run_folder.files import why_unreadable
from meta_fcos.pickles import load_pickle, unreadable

logger = logging.getLogger(__name__)

# What turns the names of a backbone alone into the detector's, tried in this order.
PREFIXES = ("", "backbone.bottom_up.", "backbone.")
# Tensors of published files that this model does not need, by name, with the reason.
IGNORED = {
    r"(.*\.)?iou_overlap\.(weight|bias)": "the branch that pretraining never trains",
    r"(fc1000|pred|linear|stem\.fc)\.(weight|bias)": "the ImageNet classifier",
    r"(.*\.)?stem\.conv1\.bias": "the stem's bias, which the batch norm after it makes useless",
    r"pixel_(mean|std)": "the config gives the pixels' normalization",
    r".*\.num_batches_tracked": "only a moving batch norm counts batches",
}
NORM_EPS = 1e-5  # of every batch norm
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class LoadReport:
    """Names that a file and a model do not share."""

    missing: tuple[str, ...]  # in the model, not in the file; they keep their values
    unexpected: tuple[str, ...]  # in the file, not in the model
    ignored: tuple[str, ...]  # in the file, known to have no place in the model


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Copy the weights in a file into ``model``, in place, and log the names that differ.

    ``.pkl`` is detectron2's zoo, as written by detectron2 or by caffe2; anything else is read as
    torch writes it, a state dict by itself or under ``model``. Names of a backbone alone get the
    detector's prefix. Frozen batch norms with scale and shift only get the mean 0 and the
    variance 1.

    Raises:
        CheckpointError: if the file cannot be read, asks for objects other than tensors and
            plain values, or does not fit the model: its shapes, norms, or none of its names.
    """
    path = Path(path)
    state = model.state_dict()
    placed, others = _place(read_state(path), state)
    unexpected = tuple(name for name in others if not _ignored(name))
    _fill_frozen_norms(model, placed)
    if faults := list(_faults(path, placed, state, unexpected)):
        raise CheckpointError(faults)
    model.load_state_dict(placed, strict=False)
    report = LoadReport(
        missing=tuple(name for name in state if name not in placed and not _ignored(name)),
        unexpected=unexpected,
        ignored=tuple(name for name in others if name not in unexpected),
    )
    _log(path, len(placed), report)
    return report


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, under detectron2's names."""
    if not path.is_file():
        fault = Fault("weights", str(path), "a file", "check the path, or download it")
        raise CheckpointError([fault])
    pickled = path.suffix == ".pkl"
    content = load_pickle(path) if pickled else _load_torch(path)
    caffe2 = False
    if isinstance(content, Mapping):
        caffe2 = pickled and not {"model", "__author__"} <= content.keys()
        # caffe2 keeps the weights of a detector under "blobs", those of a classifier bare.
        content = content.get("blobs" if caffe2 else "model", content)
    if not isinstance(content, Mapping):
        held = type(content).__name__
        raise CheckpointError([Fault(str(path), held, "tensors by name", "use weights")])
    state = {
        str(name): _tensor(path, name, value)
        for name, value in content.items()
        if isinstance(value, (np.ndarray, Tensor))
    }
    return from_caffe2(state) if caffe2 else state


def _tensor(path: Path, name: str, value: np.ndarray | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if not value.is_meta and value.layout == torch.strided:
            return value
        held = "without values" if value.is_meta else str(value.layout)
        raise CheckpointError([Fault(f"{name} in {path}", held, "dense numbers", "check the file")])
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        fault = Fault(f"{name} in {path}", value.dtype.str, "numbers", f"check the file: {error}")
        raise CheckpointError([fault]) from error


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for broken files
        allowed = "a whole file of tensors and plain values"
        raise unreadable(path, why_unreadable(error), allowed) from error


_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_ENDINGS = {
    "w": "weight", "b": "bias",
    "bn_s": "norm.weight", "bn_b": "norm.bias", "gn_s": "norm.weight", "gn_b": "norm.bias",
    "bn_gamma": "norm.weight", "bn_beta": "norm.bias",
    "bn_rm": "norm.running_mean", "bn_riv": "norm.running_var",
    "bn_running_mean": "norm.running_mean", "bn_running_var": "norm.running_var",
}  # fmt: skip
_CAFFE2_NAME = re.compile(rf"(?P<place>\w+?)_(?P<ending>{'|'.join(_ENDINGS)})")


def from_caffe2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a caffe2 ResNet's tensors to detectron2's names; momenta are dropped.

    ``res2_0_branch2a_bn_s`` becomes ``res2.0.conv1.norm.weight``. A batch norm without statistics
    has them in its scale and shift already, so it gets those that change nothing.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("_momentum"):
            continue
        renamed[_from_caffe2(name)] = value
        if name.endswith("_bn_s"):
            place = _from_caffe2(name).removesuffix("weight")
            renamed.setdefault(f"{place}running_mean", torch.zeros_like(value))
            renamed.setdefault(f"{place}running_var", torch.ones_like(value) - NORM_EPS)
    return renamed


def _from_caffe2(name: str) -> str:
    parts = _CAFFE2_NAME.fullmatch(name)
    if parts is None:
        return name
    place = parts["place"]
    if place in ("conv1", "res_conv1"):
        place = "stem.conv1"
    steps = [_BRANCHES.get(step, step) for step in place.split("_")]
    return ".".join([*steps, _ENDINGS[parts["ending"]]])


def _place(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the model's names, and the names that the model does not have."""
    placed: dict[str, Tensor] = {}
    others = []
    for name, value in tensors.items():
        bare = name.removeprefix("module.")
        target = next((p + bare for p in PREFIXES if p + bare in state), None)
        if target is None:
            others.append(name)
        else:
            # A learned number may be written with one dimension or with none.
            same_number = value.numel() == 1 == state[target].numel()
            placed[target] = value.reshape(state[target].shape) if same_number else value
    return placed, others


def _ignored(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def _fill_frozen_norms(model: nn.Module, placed: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        mean, variance = f"{name}.running_mean", f"{name}.running_var"
        given = f"{name}.weight" in placed and not {mean, variance} & placed.keys()
        if isinstance(module, FrozenBatchNorm2d) and given:
            placed[mean] = torch.zeros_like(module.running_mean)
            placed[variance] = torch.ones_like(module.running_var) - module.eps


def _faults(
    path: Path,
    placed: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    unexpected: Sequence[str],
) -> Iterator[Fault]:
    if not placed:
        advice = "use weights that were trained with this architecture"
        yield Fault(str(path), "without any name of this model", "its weights", advice)
        return
    advice = "use the config that it was trained with, or remove it from the file"
    for name, value in placed.items():
        shape, expected = tuple(value.shape), tuple(state[name].shape)
        if shape != expected:
            yield Fault(f"{name} in {path}", shape, f"{expected}, the model's shape", advice)
        elif not fits(value, state[name]):
            allowed = f"{state[name].dtype} or similar"
            yield Fault(f"{name} in {path}", str(value.dtype), allowed, advice)
    if statistics := [name for name in unexpected if name.endswith("norm.running_mean")]:
        held = f"with statistics of batch norms ({_some(statistics)})"
        allowed = "weights of the norm that MODEL.RESNETS.NORM names"
        yield Fault(str(path), held, allowed, "set MODEL.RESNETS.NORM to FrozenBN or BN")


def _log(path: Path, loaded: int, report: LoadReport) -> None:
    logger.info("Loaded %d tensors from %s", loaded, path)
    for pattern, reason in IGNORED.items():
        names = [name for name in report.ignored if re.fullmatch(pattern, name)]
        if names:
            logger.info("Ignored %s: %s", _some(names), reason)
    if report.missing:
        logger.warning("Not in the file, left as initialized: %s", _some(report.missing))
    if report.unexpected:
        logger.warning("In the file, not in the model: %s", _some(report.unexpected))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return ", ".join(names[:_SHOWN_KEYS]) + more
