"""The private parts of detectron2 and torch in ``private_upstream`` still do what they did.

Tried with detectron2 02b5c4e, on torch 2.5.1, 2.9.1 and 2.15.0.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mapped_bytes():
    """All memory of this process, touched or not."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_freed_buckets_are_a_copy_of_all_gradients_and_the_model_goes_on(group):
    from torch.nn.parallel import DistributedDataParallel

    from d2scale.detectron2.private_upstream import without_gradient_buckets

    model = nn.Linear(2**13, 2**13, bias=False)
    gradient_bytes = model.weight.numel() * 4
    wrapped = DistributedDataParallel(model)
    before = mapped_bytes()
    assert without_gradient_buckets(wrapped) is model
    assert before - mapped_bytes() == pytest.approx(gradient_bytes, rel=0.05)
    assert without_gradient_buckets(wrapped) is model
    assert without_gradient_buckets(model) is model
    inputs = torch.ones(1, 2**13)
    model(inputs).sum().backward()
    assert torch.equal(model.weight.grad[0], inputs[0])
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(inputs), model(inputs))


def test_next_batch_goes_on_and_follows_a_new_loader():
    from detectron2.engine import SimpleTrainer

    from d2scale.detectron2.private_upstream import next_batch

    trainer = SimpleTrainer(nn.Linear(1, 1), [1, 2, 3], None)
    assert [next_batch(trainer), next_batch(trainer)] == [1, 2]
    trainer.reset_data_loader(lambda: [4])
    assert next_batch(trainer) == 4


def test_the_timer_reports_what_it_is_told():
    from detectron2.engine import SimpleTrainer
    from detectron2.utils.events import EventStorage

    from d2scale.detectron2.private_upstream import SteadyIterationTimer

    times = iter([None, None, None, 7.0])
    trainer = SimpleTrainer(nn.Linear(1, 1), [], None)
    timer = SteadyIterationTimer(lambda: next(times))
    trainer.register_hooks([timer])
    with EventStorage() as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(6):
            trainer.before_step()
            trainer.after_step()
            if trainer.iter == 5:
                break
        values = [value for value, _ in trainer.storage.history("time").values()]
    # The first two iterations are not timed.
    assert values[3] == 7.0
    assert all(value < 1.0 for value in values[:3])


def test_hooks_after_backward_are_those_that_act_there():
    from detectron2.engine import HookBase, SimpleTrainer, hooks

    from d2scale.detectron2.private_upstream import hooks_after_backward

    class Acting(HookBase):
        def after_backward(self):
            pass

    acting = Acting()
    trainer = SimpleTrainer(nn.Linear(1, 1), [], None)
    trainer.register_hooks([hooks.IterationTimer(), acting])
    assert hooks_after_backward(trainer) == [acting]


def test_a_checkpoint_is_judged_before_anything_of_it_is_loaded(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    from d2scale.detectron2.private_upstream import files_judged

    model = nn.Linear(1, 1)
    DetectionCheckpointer(model, str(tmp_path)).save("model_1", iteration=1)
    own = nn.Linear(1, 1)
    before, checkpointer = own.weight.item(), DetectionCheckpointer(own, str(tmp_path))

    def judge(content):
        assert content["iteration"] == 1
        raise ValueError("judged")

    with pytest.raises(ValueError, match="judged"), files_judged(checkpointer, judge):
        checkpointer.resume_or_load("", resume=True)
    assert own.weight.item() == before
