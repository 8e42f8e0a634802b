"""What ranks must have in common; those of other machines are played."""

from __future__ import annotations

import pytest
import torch

import d2scale
from d2scale.errors import ConfigError
from d2scale.launch.comparison import refuse_different_ranks
from d2scale.step import ranks

SETTINGS = {"SOLVER.BASE_LR": 0.1, "OUTPUT_DIR": "here", "DATALOADER.NUM_WORKERS": 4}
DATA = {"boxes of mine": "7 (digest 1)"}
OPTIONS = {"--resume": False}


@pytest.fixture
def other_rank(monkeypatch):
    """Let rank 1 have some values of its own."""

    def give(changes):
        def gathered(given):
            return [given, {key: changes.get(key, value) for key, value in given.items()}]

        monkeypatch.setattr(ranks, "gather_objects", gathered)

    return give


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("SOLVER.BASE_LR", 0.2, 0.1),
        ("boxes of mine", "6 (digest 2)", DATA["boxes of mine"]),
        ("--resume", True, False),
        ("version of d2scale", "0.0", d2scale.__version__),
        ("version of torch", "0.0", torch.__version__),
    ],
)
def test_a_rank_that_was_given_something_else_is_refused(other_rank, key, value, allowed):
    other_rank({key: value})
    line = f"{key} on rank 1 is {value!r}; allowed: {allowed!r}, as on rank 0; start the run with"
    with pytest.raises(ConfigError) as raised:
        refuse_different_ranks(SETTINGS, DATA, OPTIONS)
    assert str(raised.value) == f"{line} the same on every machine"


def test_only_the_first_difference_of_the_data_is_told(other_rank):
    """Other images have other boxes."""
    other_rank({"images of mine": "6", "boxes of mine": "8"})
    with pytest.raises(ConfigError, match=r"^images of mine on rank 1 is '6'") as raised:
        refuse_different_ranks(SETTINGS, {"images of mine": "5", **DATA}, OPTIONS)
    assert len(raised.value.faults) == 1


def test_folders_and_workers_are_each_machines_own(monkeypatch):
    compared = []
    monkeypatch.setattr(ranks, "refuse_differences", lambda given, _: compared.append(given))
    refuse_different_ranks(SETTINGS, DATA, OPTIONS)
    keys = {key for given in compared for key in given}
    assert keys > {"SOLVER.BASE_LR", *DATA, *OPTIONS}
    assert not {"OUTPUT_DIR", "DATALOADER.NUM_WORKERS"} & keys


@pytest.mark.parametrize("data", [{}, DATA, {**DATA, "images of mine": "5"}])
def test_ranks_exchange_as_often_whatever_files_they_can_read(monkeypatch, data):
    exchanges = []
    monkeypatch.setattr(ranks, "gather_objects", lambda given: exchanges.append(given) or [given])
    refuse_different_ranks(SETTINGS, data, OPTIONS)
    assert len(exchanges) == 2
