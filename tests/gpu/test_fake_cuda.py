"""No tensor is left behind on the CPU: every path of a training walked on fake CUDA tensors."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.data.loader import build_train_loader
from d2scale.engine.models import new_model
from d2scale.engine.step import build_step
from d2scale.memory.worst_case import WorstCase
from d2scale.step import undo
from d2scale.step.optimizer_state import load_optimizer_state
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.out_of_memory import OutOfMemoryError
from d2scale.step.virtual_ranks import VirtualRanks
from fake_cuda import fake_cuda, move_to_fake_cuda, skip_without_fake_cuda
from meta_fcos.detector import OneStageDetector
from meta_fcos.inference import InferenceRule
from meta_fcos.targets import TargetRule
from small_detector import detector_samples, small_cfg

SAMPLES = detector_samples(4, side=64)
_CLIPPING = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE")
CHANGES = {
    "as published, AMP": ("SOLVER.AMP.ENABLED", "True"),
    "frozen batch norm, clipping": (
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2", *_CLIPPING, "value"),
        *("MODEL.FCOS.THRESH_WITH_CTR", "True", "MODEL.FCOS.LOC_LOSS_TYPE", "iou"),
    ),
    "batch norm, AdamW": (
        *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.FPN.FUSE_TYPE", "avg"),
        *("SOLVER.OPTIMIZER", "ADAMW", *_CLIPPING, "full_model"),
        *("MODEL.FCOS.CENTER_SAMPLE", "False", "MODEL.FCOS.LOC_LOSS_TYPE", "linear_iou"),
    ),
}
on_every_choice = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
# Of mixed devices every operation speaks in words of its own, and all of them name the CPU.
MIXED = "(?i)cpu"


@pytest.fixture(autouse=True)
def _can_fake():
    skip_without_fake_cuda()


def detector(*changes):
    model = new_model(small_cfg("cuda", *changes))
    move_to_fake_cuda(model)
    return model


class FailsOnce:
    """A device that is full at the first backward."""

    failed = False

    @contextmanager
    def __call__(self, name):
        if name == "backward" and not self.failed:
            self.failed = True
            raise OutOfMemoryError("CUDA out of memory")
        yield


def new_step(model, changes=(), ims_per_gpu=4, **options):
    cfg = small_cfg("cuda", *changes)
    step = build_step(cfg, model, ims_per_gpu=ims_per_gpu)
    if options:
        step = OptimizerStep(
            model, step.optimizer, ims_per_gpu=ims_per_gpu, options=StepOptions(**options)
        )
    for group in step.optimizer.param_groups:
        group.update(fused=False, foreach=True)  # torch has no fused update of fake tensors
    step.optimizer._step_supports_amp_scaling = False  # which only that takes over
    return step


def train(model, step, samples=SAMPLES, steps=2, **how):
    for number in range(steps):
        losses = step(samples, number=number, **how)
    assert losses.values.device.type == "cuda"
    for parameter in model.parameters():
        for name, value in step.optimizer.state.get(parameter, {}).items():
            assert name == "step" or value.device.type == "cuda"


@on_every_choice
def test_training_and_detection(changes):
    with fake_cuda() as backward:
        model = detector(*changes)
        backward.model = model
        train(model.train(), new_step(model, changes))
        for found in model.eval()(SAMPLES):
            assert {value.device.type for value in found.values()} == {"cuda"}


@pytest.mark.parametrize("how", [{}, {"measure": True}], ids=["plain", "noise"])
def test_micro_batches(how):
    with fake_cuda() as backward:
        backward.model = model = detector().train()
        step = new_step(model, ims_per_gpu=2)
        step.set_gain(2.0)
        train(model, step, **how)


def test_a_step_is_undone_and_taken_again():
    with fake_cuda() as backward:
        backward.model = model = detector("MODEL.RESNETS.NORM", "BN").train()
        step = new_step(model)
        train(model, step)
        step.phase = FailsOnce()
        train(model, step)
        assert step.phase.failed


def test_the_scaler():
    with fake_cuda() as backward:
        backward.model = model = detector().train()
        step = new_step(model, precision=torch.float16, scaler=GradScaler("cuda"))
        train(model, step)
        step.phase = FailsOnce()
        train(model, step)


@pytest.mark.parametrize("ordered", [False, True])
def test_virtual_ranks(ordered):
    with fake_cuda() as backward:
        backward.model = model = detector("MODEL.RESNETS.NORM", "BN").train()
        virtual = VirtualRanks(model, 2, 0, ordered=ordered)
        train(model, new_step(model, ims_per_gpu=2, virtual_ranks=virtual))
        model.load_state_dict(model.state_dict())
        virtual.load_state_dict(virtual.state_dict())


def test_the_worst_batches_of_a_measurement():
    worst = WorstCase(((64, 96), (96, 64)), 3, "a test")
    with fake_cuda() as backward:
        backward.model = model = detector().train()
        step = new_step(model)
        for batch in worst.trial_batches(2):
            step.attempt(batch)


def test_what_the_loader_hands_over(coco):
    cfg = small_cfg("cuda", "DATASETS.TRAIN", "('coco_2017_train',)", "DATALOADER.NUM_WORKERS", 0)
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    dataset = load_training_dataset(cfg)
    with build_train_loader(cfg, dataset, world_size=1, rank=0, ims_per_batch=4, seed=0) as loader:
        batches = list(islice(loader, 2))
    with fake_cuda() as backward:
        backward.model = model = detector("MODEL.FCOS.NUM_CLASSES", 80).train()
        for batch in batches:
            train(model, new_step(model), batch, steps=1)


def test_a_state_from_the_host_is_loaded_to_the_device():
    with fake_cuda() as backward:
        backward.model = model = detector().train()
        step = new_step(model)
        train(model, step)
        saved = step.optimizer.state_dict()
        for values in saved["state"].values():
            values["momentum_buffer"] = values["momentum_buffer"].cpu()
        load_optimizer_state(step.optimizer, saved)
        train(model, step)


def _boxes_stay(monkeypatch):
    original = TargetRule.assign

    def forgotten(self, boxes, classes, shapes, dtype, device=None):
        return original(self, boxes, classes, shapes, dtype)

    monkeypatch.setattr(TargetRule, "assign", forgotten)


def _mean_stays(monkeypatch):
    original = OneStageDetector._batch

    def forgotten(self, samples):
        self._buffers["pixel_mean"], kept = torch.zeros(3, 1, 1), self.pixel_mean
        try:
            return original(self, samples).to("cuda")
        finally:
            self._buffers["pixel_mean"] = kept

    monkeypatch.setattr(OneStageDetector, "_batch", forgotten)


def _scores_stay(monkeypatch):
    original = InferenceRule._suppress

    def forgotten(self, boxes, scores, classes):
        return original(self, boxes, scores.cpu(), classes)

    monkeypatch.setattr(InferenceRule, "_suppress", forgotten)


def _momentum_stays(monkeypatch):
    original = torch.zeros_like

    def forgotten(tensor, **options):
        return original(tensor, **{**options, "device": "cpu"})

    monkeypatch.setattr("d2scale.step.update.torch.zeros_like", forgotten)


def _copies_stay(monkeypatch):
    monkeypatch.setattr(undo.StepUndo, "remember", lambda self: self._mix())
    monkeypatch.setattr(
        undo.StepUndo,
        "_mix",
        lambda self: [torch.zeros(p.shape).add_(p) for p in self._changing()],
        raising=False,
    )


@pytest.mark.parametrize(
    "forget", [_boxes_stay, _mean_stays, _scores_stay, _momentum_stays, _copies_stay]
)
def test_a_forgotten_move_is_found(forget, monkeypatch):
    forget(monkeypatch)

    def walk(model):
        step = new_step(model.train())
        step.set_gain(2.0)  # begins the momentum
        train(model, step)
        model.eval()(SAMPLES)

    with fake_cuda() as backward:
        backward.model = model = detector()
        with pytest.raises((RuntimeError, AssertionError), match=MIXED):
            walk(model)
