"""Checkpoints that a disk or a stranger has changed: refused in one line, or harmless."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch

from checkpoints import resume, write_checkpoint
from d2scale.config import load_cfg
from d2scale.engine.checkpoint.files import read_checkpoint
from d2scale.errors import CheckpointError
from plans import plan_of
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


@pytest.fixture
def checkpoint(tmp_path, cfg, recipe):
    """A checkpoint after the first step."""
    return write_checkpoint(tmp_path, cfg, plan_of(recipe, 1))


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


def test_a_flipped_bit_in_the_name_of_a_part_is_told(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[content.index(b"/byteorder") + 1] = 0xB5  # no UTF-8
    checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(checkpoint)


def test_a_flipped_bit_in_the_name_of_d2scales_record_is_told(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes().replace(b"d2scale", b"d2{cale"))
    with pytest.raises(CheckpointError, match=r"damaged.*data\.pkl"):
        read_checkpoint(checkpoint)


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
