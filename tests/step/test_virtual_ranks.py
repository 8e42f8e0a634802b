from __future__ import annotations

import logging
import random
from enum import IntEnum

import numpy as np
import pytest
import torch
from torch import nn

from d2scale.errors import ConfigError
from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology
from d2scale.planning.rules import own_virtual_ranks
from d2scale.step.random_stream import random_stream
from d2scale.step.virtual_ranks import VirtualRanks
from virtual_cluster import (
    LateModel,
    QueueModel,
    StatefulModel,
    build,
    cluster_weights,
    make_batch,
    resumed_weights,
    states_of_ranks,
    take_steps,
    virtual_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, STEPS = 4, 3


def difference(one, other):
    """The largest difference of weights, buffers and the moving normalizer."""
    (weights, normalizer), (others, other_normalizer) = one, other
    assert weights.keys() == others.keys()
    differences = [abs(normalizer - other_normalizer)]
    differences += [(weights[name] - others[name]).abs().max().item() for name in weights]
    return max(differences)


def test_two_virtual_ranks_are_a_cluster_of_two_bit_by_bit():
    cluster = launch(cluster_weights, (STEPS,), Topology(2))
    assert difference(virtual_weights(2, STEPS), cluster) == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ordered_sum_is_the_same_on_any_number_of_ranks(world_size):
    alone = virtual_weights(COUNT, STEPS, ordered=True)
    ranks = launch(virtual_weights, (COUNT, STEPS, True), Topology(world_size))
    assert difference(alone, ranks) == 0
    assert difference(alone, virtual_weights(COUNT, STEPS)) == 0


def test_sum_in_another_order_differs_by_rounding_alone():
    alone = virtual_weights(COUNT, STEPS)
    ranks = launch(virtual_weights, (COUNT, STEPS), Topology(3))
    assert difference(alone, ranks) < 1e-13
    assert difference(alone, virtual_weights(COUNT, STEPS - 1)) > 1e-3


def test_resuming_on_another_number_of_ranks_restores_every_state():
    kept = launch(states_of_ranks, (COUNT, 2), Topology(3))
    states, weights, momentum = kept
    normalizers = [state["attributes"][""]["normalizer"] for state in states["states"]]
    assert len(set(normalizers)) == COUNT
    whole = virtual_weights(COUNT, 4, ordered=True)
    assert difference(resumed_weights(COUNT, states, weights, momentum, range(2, 4)), whole) == 0
    ranks = launch(resumed_weights, (COUNT, states, weights, momentum, range(2, 4)), Topology(2))
    assert difference(ranks, whole) == 0


def test_another_number_of_virtual_ranks_begins_with_the_first_ones_state(caplog):
    step, virtual = build(2)
    take_steps(step, virtual, range(2))
    state = virtual.state_dict()
    _, other = build(3)
    other.load_state_dict(state)
    assert "2 virtual ranks, the run has 3" in caplog.text
    states = other.state_dict()["states"]
    first = state["states"][0]["attributes"]
    assert [s["attributes"] for s in states] == [first] * 3


def test_step_that_runs_out_of_memory_leaves_no_trace_in_any_state():
    calls = []

    class FailsOnce(StatefulModel):
        def forward(self, samples):
            losses = super().forward(samples)
            calls.append(len(samples))
            if len(calls) == 6:  # in the second step, its second virtual rank
                raise torch.cuda.OutOfMemoryError("out of memory")
            return losses

    expected, own = build(4)
    step, virtual = build(4, model=FailsOnce())
    take_steps(expected, own, range(2))
    take_steps(step, virtual, range(1))
    take_steps(step, virtual, range(1, 2))
    assert len(calls) == 4 + 2 + 4
    weights = [model.state_dict() for model in (step.model, expected.model)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    own_states, states = own.state_dict()["states"], virtual.state_dict()["states"]
    assert [s["attributes"] for s in states] == [s["attributes"] for s in own_states]


def test_a_virtual_rank_that_does_not_fit_is_split_with_a_warning(caplog):
    step, virtual = build(2, ims_per_gpu=1)
    take_steps(step, virtual, range(1))
    assert "Splitting a virtual rank is approximate for this model" in caplog.text
    assert step.model.forwards == 2


def test_model_in_evaluation_has_the_state_of_virtual_rank_0():
    step, virtual = build(3)
    take_steps(step, virtual, range(2))
    first = virtual.state_dict()["states"][0]
    assert step.model.normalizer == first["attributes"][""]["normalizer"]
    assert torch.equal(step.model.mean, first["buffers"]["mean"])
    assert step.model.forwards == 2


@pytest.mark.parametrize(("kind", "name"), [(QueueModel, "queue"), (LateModel, "late")])
def test_state_that_cannot_be_held_apart_is_named(caplog, kind, name):
    step, virtual = build(2, model=kind())
    take_steps(step, virtual, range(2))
    assert caplog.text.count("share what this model keeps as") == 1
    assert f"tensors: {name}. If" in caplog.text


def test_state_that_cannot_be_held_apart_is_refused_by_on():
    step, virtual = build(2, model=QueueModel(), refuses=True)
    with pytest.raises(ConfigError, match=r"queue"):
        take_steps(step, virtual, range(1))


def test_what_acts_before_the_update_sees_the_state_of_virtual_rank_0():
    step, virtual = build(3)
    seen = []
    rank_batch = [sample for rank in virtual.own for sample in make_batch(rank, 0)]
    step(rank_batch, lambda losses: seen.append(step.model.mean.item()))
    assert seen == [step.model.mean.item()]
    assert seen == [virtual.state_dict()["states"][0]["buffers"]["mean"].item()]


def test_attributes_of_numpy_and_of_enumerations_are_kept_as_plain_values(tmp_path):
    class Kind(IntEnum):
        LATE = 2

    step, virtual = build(2)
    step.model.average, step.model.kind = np.float64(0.5), (Kind.LATE, True)
    torch.save(virtual.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)["states"][0]["attributes"][""]
    assert (state["average"], state["kind"]) == (0.5, (2, True))


def test_model_whose_state_can_be_held_has_no_warning(caplog):
    caplog.set_level(logging.WARNING)
    take_steps(*build(2), range(2))
    assert not caplog.text


def test_synchronised_batch_norm_couples_virtual_ranks():
    model = nn.SyncBatchNorm(2)
    with pytest.raises(ValueError, match="couples"):
        VirtualRanks(model, 2, 0)


def test_images_that_are_no_whole_virtual_ranks_are_refused():
    step, _ = build(2)
    with pytest.raises(ValueError, match="3 images cannot be 2 virtual ranks"):
        step([*make_batch(0, 0), make_batch(1, 0)[0]])


def test_random_streams_differ_and_leave_the_generators_alone():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    undisturbed = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    drawn = []
    for place in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0), (3, 0, 0)):
        with random_stream(*place):
            drawn.append(draw())
    assert draw() == undisturbed
    assert drawn[0] == drawn[-1]
    assert len({value for values in drawn[:-1] for value in values}) == 12


def test_own_virtual_ranks_cover_all_of_them_once():
    for count, world_size in ((4, 1), (4, 3), (8, 3), (64, 7)):
        own = [own_virtual_ranks(count, rank, world_size) for rank in range(world_size)]
        assert [number for of_rank in own for number in of_rank] == list(range(count))


def test_losses_are_means_over_the_virtual_ranks():
    step, virtual = build(2)
    (losses,) = take_steps(step, virtual, range(1))
    each = []
    for number in range(2):
        model = StatefulModel()
        with random_stream(7, 0, number):
            each.append(model(make_batch(number, 0)))
    for name, value in losses.items():
        assert value == pytest.approx(sum(e[name].item() for e in each) / 2, rel=1e-12)
