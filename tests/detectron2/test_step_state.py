"""What checkpoints keep of the steps, and what ranks evaluate."""

import pytest
import torch
from torch import nn

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology
from d2scale.step import ranks
from d2scale.step.agreement import AgreedOutOfMemoryError


class Counter(nn.Module):
    """Keeps a number and a buffer that its forwards change."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.count = 0


def test_without_virtual_ranks_a_checkpoint_keeps_attributes():
    from d2scale.detectron2.step_state import StepState

    model, other = Counter(), Counter()
    state, resumed = StepState(model), StepState(other)
    model.count, model.seen = 7, torch.ones(())
    resumed.load_state_dict(state.state_dict())
    # The buffer comes with the model.
    assert (other.count, other.seen.item()) == (7, 0.0)


def test_a_checkpoint_keeps_the_images_per_gpu_that_fit():
    from d2scale.detectron2.step_state import StepState
    from d2scale.step.guard import MicroBatchSize

    cut, resumed, older = (MicroBatchSize(8, torch.device("cpu")) for _ in range(3))
    for _ in range(2):
        cut.after_failure(AgreedOutOfMemoryError("forward", [0], ""), 8)
    state = StepState(Counter())
    state.keep_size(cut)
    content = state.state_dict()
    older_content = {key: value for key, value in content.items() if key != "micro_batches"}
    for size, kept in ((resumed, content), (older, older_content)):
        state = StepState(Counter())
        state.load_state_dict(kept)
        state.keep_size(size)
        assert state.state_dict()["micro_batches"] == size.state_dict()
    assert (resumed.now, older.now) == (4, 8)


def states_while_evaluating():
    from d2scale.detectron2.step_state import StepState

    model = Counter()
    state = StepState(model)
    model.count = ranks.rank() + 1
    model.seen.fill_(ranks.rank() + 1)
    with state.of_first_rank():
        inside = (model.count, model.seen.item())
    return ranks.gather_objects((inside, (model.count, model.seen.item())))


def test_all_ranks_evaluate_what_a_checkpoint_holds():
    assert launch(states_while_evaluating, topology=Topology(2)) == [
        ((1, 1.0), (1, 1.0)),
        ((1, 1.0), (2, 2.0)),
    ]


def test_a_checkpoint_at_an_unexpected_moment_says_so(caplog):
    from d2scale.detectron2.step_state import StepState
    from d2scale.step.virtual_ranks import VirtualRanks

    model = Counter()
    state = StepState(model, VirtualRanks(model, 2, seed=0))
    assert len(state.state_dict()["virtual_ranks"]["states"]) == 1
    assert "where d2scale did not expect one" in caplog.text
    caplog.clear()
    state.gather()
    assert len(state.state_dict()["virtual_ranks"]["states"]) == 2
    state.forget()
    assert not caplog.text


@pytest.mark.parametrize(
    ("done", "gathers", "evaluates"), [(3, True, False), (4, True, True), (5, False, False)]
)
def test_states_are_gathered_where_hooks_save_or_evaluate(monkeypatch, done, gathers, evaluates):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import SimpleTrainer, hooks

    from d2scale.detectron2.private_upstream import insert_hooks
    from d2scale.detectron2.step_state import StateHook, StepState

    calls = []
    model = Counter()
    state = StepState(model)
    monkeypatch.setattr(state, "gather", lambda: calls.append("gather"))
    monkeypatch.setattr(StateHook, "_begin_sharing", lambda hook: calls.append("evaluate"))
    trainer = SimpleTrainer(model, [], None)
    saving = hooks.PeriodicCheckpointer(DetectionCheckpointer(model), 3)
    trainer.register_hooks([hooks.IterationTimer(), saving, hooks.EvalHook(4, dict)])
    hook = StateHook(state)
    insert_hooks(trainer, [hook])
    assert trainer._hooks[1] is hook
    trainer.max_iter, trainer.iter = 100, done - 1
    hook.before_train()
    hook.after_step()
    assert calls == ["gather"] * gathers + ["evaluate"] * evaluates
