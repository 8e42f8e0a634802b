"""Exact micro-batches for detectron2's RetinaNet and FCOS, when a virtual rank does not fit.

Both divide their losses by a moving average of the positive anchors of a forward. The positives
follow from the ground truth and the padded size alone, so they are counted over all images of the
virtual rank before the first forward; the average is updated once, and all micro-batches divide
by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F

Samples = Sequence[Mapping[str, Any]]
_IMAGES = "images"


class SplitDenseDetector:
    """Takes the forward of some images of a virtual rank, with their share of its losses."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._samples: list[Mapping[str, Any]] = []  # those that loss_normalizers was given
        self._padded_size = (0, 0)  # in pixels, of all images of the virtual rank
        self._positives = 0
        self._average: float | None = None  # None: not updated yet for this virtual rank

    def loss_normalizers(self, samples: Samples) -> dict[str, Tensor]:
        """Return the number of ``samples``: positives follow when all images are known."""
        self._samples += samples
        return {_IMAGES: torch.tensor(float(len(samples)), dtype=torch.float64)}

    @torch.no_grad()
    def finish_normalizers(self, totals: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
        """Begin a virtual rank: count the positives of the ``samples`` since the last one."""
        # An attempt that failed before it came here has left samples too.
        samples, self._samples = self._samples[-round(float(totals[_IMAGES])) :], []
        self._padded_size = self._size_of(samples)
        self._positives = self._count(samples)
        self._average = None
        return totals

    def __call__(self, samples: Samples, normalizers: Mapping[str, Tensor]) -> Any:
        """Return the losses of ``samples``, divided by the virtual rank's moving average."""
        with (
            _replaced(self._model, "_ema_update", self._update_once),
            _replaced(self._model, "preprocess_image", self._preprocess),
        ):
            return self._model(samples)

    def _update_once(self, name: str, own: float, *arguments: Any, **options: Any) -> float:
        if self._average is None:
            # One forward would not divide by less than one either.
            positives = max(self._positives, 1)
            update = type(self._model)._ema_update
            self._average = update(self._model, name, positives, *arguments, **options)
        assert self._average is not None
        return self._average

    def _preprocess(self, samples: Samples) -> ImageList:
        images = type(self._model).preprocess_image(self._model, samples)
        height, width = self._padded_size
        bottom, right = height - images.tensor.shape[-2], width - images.tensor.shape[-1]
        # With what detectron2 pads: zero, once the mean is subtracted.
        return ImageList(F.pad(images.tensor, (0, right, 0, bottom)), images.image_sizes)

    def _size_of(self, samples: Samples) -> tuple[int, int]:
        backbone = self._model.backbone
        padded = ImageList.from_tensors(
            [torch.empty(1, *sample["image"].shape[-2:], device="meta") for sample in samples],
            backbone.size_divisibility,
            padding_constraints=backbone.padding_constraints,
        )
        height, width = padded.tensor.shape[-2:]
        return height, width

    def _count(self, samples: Samples) -> int:
        model = self._model
        height, width = self._padded_size
        shapes = model.backbone.output_shape()
        strides = [shapes[name].stride for name in model.head_in_features]
        # Anchors depend on the shapes of the features, and every layer that halves them rounds up.
        features = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in strides]
        anchors = model.anchor_generator(features)
        positives = torch.zeros((), dtype=torch.int64, device=model.device)
        for sample in samples:
            (labels,), _ = model.label_anchors(anchors, [sample["instances"].to(model.device)])
            positives += ((labels >= 0) & (labels != model.num_classes)).sum()
        return int(positives)


def split_model(model: nn.Module) -> SplitDenseDetector | None:
    """Return what takes exact micro-batches of a virtual rank of ``model``, None if nothing does.

    Subclasses may compute other losses, so they get none.
    """
    return SplitDenseDetector(model) if type(model) in (RetinaNet, FCOS) else None


@contextmanager
def _replaced(model: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    # An attribute of the instance stands before the method of its class.
    vars(model)[name] = method
    try:
        yield
    finally:
        del vars(model)[name]
