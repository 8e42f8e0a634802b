import pytest
import torch
from torch import nn

from d2scale.memory.tracker import StorageTracker
from d2scale.step.out_of_memory import OutOfMemoryError
from d2scale.step.private_torch import FakeTensorMode

KIB = 1024


def floats(kib):
    return torch.zeros(kib * KIB // 4)


def test_a_storage_counts_once_and_until_its_last_view_dies():
    tracker = StorageTracker()
    with tracker:
        whole = floats(8)
        view = whole[:10].view(2, 5)
        assert tracker.live_bytes == 8 * KIB
        del whole
        assert tracker.live_bytes == 8 * KIB
        del view
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8 * KIB)


def test_what_autograd_saves_counts_until_backward_has_used_it():
    x = torch.ones(2 * KIB, requires_grad=True)
    tracker = StorageTracker()
    with tracker:
        y = x.exp()  # saves its result
        total = y.sum()
        del y
        assert tracker.live_bytes == 8 * KIB + 4
        total.backward()
        del total
        assert tracker.live_bytes == 8 * KIB  # the gradient
    x.grad = None
    assert tracker.live_bytes == 0


def test_an_operation_in_place_takes_nothing():
    tracker = StorageTracker()
    with tracker:
        x = floats(4)
        x.add_(1).relu_()
        assert tracker.peak_bytes == 4 * KIB


def test_a_storage_that_grows_counts_with_its_new_size():
    tracker = StorageTracker()
    with tracker:
        x = floats(4)
        x.resize_(4 * KIB)
        assert tracker.live_bytes == 16 * KIB
        del x
    assert tracker.live_bytes == 0


def test_tensors_from_elsewhere_count_when_given_and_the_meta_device_never():
    before = floats(4)
    tracker = StorageTracker()
    with tracker:
        tracker.count(before, before.view(-1))
        torch.empty(10**9, device="meta")
        assert tracker.live_bytes == 4 * KIB


def test_a_budget_is_kept_by_torchs_own_error_and_the_step_can_be_cleaned_up():
    tracker = StorageTracker(budget_bytes=20 * KIB)
    with tracker:
        kept = floats(16)
        with pytest.raises(OutOfMemoryError, match="20480 are in use"):
            floats(8)
        assert tracker.live_bytes == 16 * KIB
        floats(4)
        del kept
        floats(8)
    assert tracker.peak_bytes == 20 * KIB


def test_a_recording_knows_what_lived_before_and_the_phases():
    tracker = StorageTracker()
    with tracker:
        before = floats(4)
        with tracker.recording() as trace:
            with tracker.phase("forward"):
                x = floats(8)
            with tracker.phase("backward"):
                y = x + 1
            del x, y
    assert [a.nbytes for a in trace.held] == [before.untyped_storage().nbytes()]
    assert [(a.operation, a.phase, a.nbytes) for a in trace.allocations()] == [
        ("aten::zeros", "forward", 8 * KIB),
        ("aten::add", "backward", 8 * KIB),
    ]
    assert [event.is_free for event in trace.events] == [False, False, True, True]


def step_peak(fake):
    tracker = StorageTracker()
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 1, 3))
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach())))
            with tracker:
                model(torch.zeros(2, 3, 20, 20)).sum().backward()
    else:
        with tracker:
            model(torch.zeros(2, 3, 20, 20)).sum().backward()
    return tracker.peak_bytes, tracker.live_bytes


def test_fake_tensors_count_as_real_ones_do():
    assert step_peak(fake=True) == step_peak(fake=False)
