"""Checkpoints that a disk or a stranger has changed: refused in one line, or harmless."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch

from d2scale.config import load_cfg
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.files import read_checkpoint
from d2scale.engine.checkpoint.resume import RunRecord, resume_training
from d2scale.engine.data.sampling import StepSampler
from d2scale.errors import CheckpointError
from d2scale.planning.progress import recipe_of
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.clock import StepClock
from d2scale.step.guard import MicroBatchSize
from plans import plan_of
from standins import StandIn
from training_processes import RECIPE
from wrong_values import changed, places_in

WRONG = (None, True, -1, math.nan, 10**30, "x", [[]], {"x": 1}, torch.ones(2))
# A changed recipe or plan is refused key by key, which other tests show.
LEFT_OUT = [("d2scale", "recipe"), ("d2scale", "plan")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def cfg(recipe, tmp_path):
    return load_cfg(str(recipe), ["OUTPUT_DIR", str(tmp_path)])


def new_checkpointer(folder, cfg, plan):
    model = StandIn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    size = MicroBatchSize(4, torch.device("cpu"))
    checkpointer = RunCheckpointer(model, folder, optimizer=optimizer, micro_batches=size)
    RunRecord(checkpointer, plan, recipe_of(cfg), 7)
    return checkpointer


@pytest.fixture
def checkpoint(tmp_path, cfg, recipe):
    """A checkpoint after the first step."""
    clock, sampler = StepClock(), StepSampler(20, 4, 7)
    next(sampler)
    clock.steps = 1
    progress = {"iteration": 0, "images_seen": 4, "sampler": sampler.state_dict()}
    checkpointer = new_checkpointer(tmp_path, cfg, plan_of(recipe, 1))
    size = checkpointer.checkpointables["micro_batches"]
    failure = AgreedOutOfMemoryError("forward", [0], "")
    for _ in range(2):  # once it is taken again as it was
        size.after_failure(failure, 4)
    checkpointer.save("model_0000000", **progress, clock=clock.state_dict())
    return tmp_path / "model_0000000.pth"


def resume(folder, cfg, plan):
    checkpointer = new_checkpointer(folder, cfg, plan)
    position = resume_training(checkpointer, cfg, plan, recipe_of(cfg), seed=7)
    checkpointer.checkpointables["optimizer"].step()
    size = checkpointer.checkpointables["micro_batches"]
    size.begin_step()
    size.end_step()
    sampler = StepSampler(20, 4, 7)
    if position.sampler is not None:
        sampler.load_state_dict(position.sampler)
    next(sampler)


def test_any_value_of_any_kind_anywhere_is_refused_in_one_line_or_does_no_harm(
    checkpoint, cfg, recipe
):
    plan, whole = plan_of(recipe, 1), read_checkpoint(checkpoint)
    resume(checkpoint.parent, cfg, plan)
    errors, places = [], [place for place in places_in(whole) if place[:2] not in LEFT_OUT]
    for place, value in itertools.product(places, WRONG):
        torch.save(changed(whole, place, value), checkpoint)
        try:
            resume(checkpoint.parent, cfg, plan)
        except CheckpointError as error:
            errors.append(error)
    assert len(errors) > len(places)
    for error in errors:
        assert len(str(error).splitlines()) == len(error.faults)


def test_a_flipped_bit_is_named(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    place = content.index(torch.load(checkpoint)["model"]["stem.weight"].numpy().tobytes())
    content[place + 5] ^= 8
    checkpoint.write_bytes(content)
    torch.load(checkpoint)  # says nothing
    with pytest.raises(CheckpointError, match=r"damaged.*its part .*/data/") as raised:
        read_checkpoint(checkpoint)
    assert "\n" not in str(raised.value)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize("write", [torch.save, lambda content, file: pickle.dump(content, file)])
def test_what_a_foreign_file_asks_for_is_named_and_nobody_is_advised_to_trust_it(tmp_path, write):
    with open(tmp_path / "x.pth", "wb") as file:
        write({"model": Hostile()}, file)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(tmp_path / "x.pth")
    if write is torch.save:
        assert "asks for exec" in str(raised.value)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("name", ["x" * 10_000, "a.pth\nb.pth", "a\0b", ""])
def test_last_checkpoint_that_names_no_file_is_passed_over(checkpoint, cfg, recipe, name):
    (checkpoint.parent / "last_checkpoint").write_text(name)
    resume(checkpoint.parent, cfg, plan_of(recipe, 1))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to("meta"),
        lambda weight: weight.int(),
        lambda weight: weight.tolist(),
    ],
)
def test_weights_that_are_none_are_named(checkpoint, cfg, recipe, change):
    content = read_checkpoint(checkpoint)
    content["model"]["stem.weight"] = change(content["model"]["stem.weight"])
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=r"no weights: stem\.weight"):
        resume(checkpoint.parent, cfg, plan_of(recipe, 1))
