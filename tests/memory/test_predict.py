import pytest
import torch
from torch import nn

import small_training
from d2scale.config import load_cfg
from d2scale.engine.memory import workload_of
from d2scale.launch.launch import Topology, launch
from d2scale.memory.predict import Workload, make_optimizer_state, predict, record_step
from d2scale.memory.tracker import StorageTracker
from d2scale.memory.worst_case import WorstCase
from d2scale.step.averaging import averaging_bytes
from d2scale.step.optimizer_step import OptimizerStep
from small_training import predict_on_the_first_rank

WORST_CASE = WorstCase(((160, 192),), 7, "a test")
NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
)


class Net(nn.Module):
    """Losses as of a detector, over images that are given one by one."""

    def __init__(self, channels=16, hidden=4, outputs=2, pooled=False):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, hidden, 3)
        )
        self.pooled = pooled
        self.last = nn.Linear(hidden, outputs)

    def forward(self, samples):
        images = torch.stack([(sample["image"] / 255.0) * 2 - 1 for sample in samples])
        maps = self.convs(images)
        scores = self.last(maps.mean((2, 3)) if self.pooled else maps.movedim(1, 3))
        return {"loss_cls": scores.square().sum(), "loss_loc": maps.abs().mean()}


class Choosy(Net):
    """Looks at values: what is positive decides the shapes."""

    def forward(self, samples):
        losses = super().forward(samples)
        boxes = torch.cat([sample["boxes"] for sample in samples])
        return losses | {"loss_box": boxes[boxes[:, 0] > 10].sum() * self.last.weight.sum()}


def workload(model_class=Net, optimizer=torch.optim.SGD, **options):
    def build_step(device):
        model = model_class(**options)
        chosen = {"lr": 0.01, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.01}
        update = optimizer(model.parameters(), foreach=True, **chosen)
        return OptimizerStep(model, update, ims_per_gpu=1)

    return Workload(build_step, WORST_CASE.samples)


def counted_peak(work, images):
    """Peak of a real step on the CPU, the optimizer's state being there already."""
    step = work.build_step(torch.device("cpu"))
    tracker = StorageTracker()
    with tracker:
        tracker.count(*step.held_tensors())
        make_optimizer_state(step.optimizer)
    record_step(step, work.make_batch(images), tracker)
    return tracker.peak_bytes


@pytest.mark.parametrize("fake", [True, False])
def test_one_and_two_images_tell_four_and_eight(fake):
    prediction = predict(workload(), fake=fake)
    for images in (1, 2, 4, 8):
        assert prediction.live_bytes(images) == pytest.approx(
            counted_peak(workload(), images), rel=0.002
        )


def test_a_small_models_peak_is_its_optimizer_step_until_the_images_are_many():
    work = workload(Net, torch.optim.AdamW, hidden=8, outputs=500_000, pooled=True)
    prediction = predict(work)
    assert prediction.live_bytes(1) == prediction.live_bytes(2)
    for images in (1, 2, 8, 24):
        assert prediction.live_bytes(images) == pytest.approx(counted_peak(work, images), rel=0.002)
    assert prediction.live_bytes(24) > 1.5 * prediction.live_bytes(2)
    profile = prediction.profile(work)
    budget = profile.peak_bytes(20)
    assert profile.largest_ims_per_gpu(budget) == 20


def metafcos(*opts):
    cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", [*NARROW, *opts])
    return workload_of(cfg, WORST_CASE)


@pytest.mark.parametrize(
    "opts", [(), ("SOLVER.OPTIMIZER", "adamw"), ("SOLVER.CLIP_GRADIENTS.ENABLED", "True")]
)
def test_metafcos_is_predicted_with_fake_tensors(opts):
    prediction = predict(metafcos(*opts))
    assert prediction.fake
    for images in (4, 8):
        assert prediction.live_bytes(images) == pytest.approx(
            counted_peak(metafcos(*opts), images), rel=0.02
        )


def test_half_precision_and_checkpointing_save_memory():
    amp = ("SOLVER.AMP.ENABLED", "True")
    checkpointing = ("D2SCALE.ACTIVATION_CHECKPOINTING", "True")
    choices = ((), checkpointing, amp, amp + checkpointing)
    peaks = [predict(metafcos(*opts)).live_bytes(64) for opts in choices]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_what_is_computed_again_takes_the_precision_of_the_first_time():
    # Group norm is computed in float32 on CUDA; PyTorch compares what a second forward saves.
    opts = ("MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0", "SOLVER.AMP.ENABLED")
    both = predict(metafcos(*opts, "True", "D2SCALE.ACTIVATION_CHECKPOINTING", "True"))
    assert both.live_bytes(32) < predict(metafcos(*opts, "True")).live_bytes(32)


def test_a_device_without_a_caching_allocator_takes_what_lives():
    work = workload()
    prediction = predict(work)
    profile = prediction.profile(work, caching=False)
    for images in (1, 4, 40):
        assert profile.peak_bytes(images) == prediction.live_bytes(images)
        assert prediction.profile(work).peak_bytes(images) > prediction.live_bytes(images)


def test_a_model_that_looks_at_values_is_counted_with_real_steps():
    prediction = predict(workload(Choosy))
    assert not prediction.fake
    assert prediction.live_bytes(8) == pytest.approx(counted_peak(workload(Choosy), 8), rel=0.02)


def test_another_failure_of_the_model_passes_through_untouched():
    class Broken(Net):
        def forward(self, samples):
            raise ZeroDivisionError("a fault of the model")

    with pytest.raises(ZeroDivisionError, match="a fault of the model"):
        predict(workload(Broken))


def test_the_profile_says_how_it_was_made_and_what_it_covers():
    work = metafcos("SOLVER.AMP.ENABLED", "True")
    profile = predict(work).profile(work)
    assert profile.source == "predicted"
    assert "160x192" in profile.description
    assert "AMP float16" in profile.description
    assert "fake tensors" in profile.description
    assert profile.covers["precision"] == "16 bit"
    assert profile.context_bytes > 0
    # The fused optimizer works in place: it has nothing to add.
    assert {phase.name for phase in profile.phases} == {"forward", "backward"}
    for point in profile.points:
        assert point.live_bytes <= point.needed_bytes <= point.reserved_bytes * 1.01
        # What a plan counts with, runtime included, is at least what the allocator needs.
        needed = point.needed_bytes + profile.context_bytes
        assert profile.peak_bytes(point.ims_per_gpu) >= needed * 0.999


def test_more_ranks_hold_averaging_buffers_and_accumulation_the_gradients():
    work = workload()
    prediction = predict(work)
    profile = prediction.profile(work)
    parameters = list(work.build_step(torch.device("cpu")).model.parameters())
    assert prediction.gradient_bytes == 4 * sum(p.numel() for p in parameters)
    assert prediction.averaging_bytes == averaging_bytes(parameters)
    alone = profile.peak_bytes(8)
    assert profile.peak_bytes(8, world_size=2) == alone + prediction.averaging_bytes
    assert profile.peak_bytes(8, accumulates=True) == alone + prediction.gradient_bytes
    larger = predict(metafcos())
    assert larger.reserved_bytes(8, world_size=2) > larger.reserved_bytes(8)


def test_a_prediction_inside_a_run_of_several_ranks_waits_for_no_other():
    first, others = launch(predict_on_the_first_rank, [], Topology(2))
    assert first == predict(small_training.workload()).live_bytes(4)
    assert others is None


def test_convolutions_are_given_a_workspace_that_no_tensor_holds(monkeypatch):
    def predicted(part):
        monkeypatch.setattr("d2scale.memory.predict.WORKSPACE_PART", part)
        return predict(metafcos())

    without, half, all_of_it = map(predicted, (0.0, 0.5, 1.0))
    assert half.live_bytes(16) == without.live_bytes(16)
    needed = [prediction.needed_bytes(16) for prediction in (without, half, all_of_it)]
    assert needed == sorted(needed)
    assert needed[0] < needed[2]


def test_a_workspace_is_a_part_of_input_weight_and_output():
    tracker = StorageTracker(workspace_part=0.5)
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    x = torch.rand(3, 2, 8, 8, requires_grad=True)
    with tracker, tracker.recording() as trace:
        conv(x).sum().backward()
    operands = 4 * (3 * 2 * 64 + 4 * 2 * 9 + 3 * 4 * 64)
    workspaces = [a for a in trace.allocations() if a.operation == "workspace"]
    assert [workspace.nbytes for workspace in workspaces] == [operands // 2] * 2
