"""Which checkpoint detectron2 goes on from, and what it says of broken or foreign ones."""

import os
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="needs detectron2, which is not on the package index")

from d2scale.detectron2.last_checkpoint import (
    check_readable,
    last_whole_checkpoint,
    name_last_checkpoint,
    using,
)
from d2scale.detectron2.private_upstream import WholeCheckpointer, files_judged
from d2scale.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, the second of which is the last."""
    for number in (1, 3):
        path = tmp_path / f"model_000000{number}.pth"
        torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
        os.utime(path, (number, number))
    (tmp_path / "last_checkpoint").write_text(path.name)
    return tmp_path


def test_the_one_that_is_named(folder):
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    assert last_whole_checkpoint(folder) == folder / "model_0000001.pth"


@pytest.mark.parametrize("name", [None, "", "..", "a\nb", "x" * 1000, "model_0000003.pth"])
def test_another_in_the_place_of_one_that_was_cut_short(folder, name, caplog):
    if name == "model_0000003.pth":
        os.truncate(folder / name, 500)
    (folder / "last_checkpoint").unlink()
    if name is not None:
        (folder / "last_checkpoint").write_text(name)
    name_last_checkpoint(folder)
    expected = "model_0000001.pth" if name == "model_0000003.pth" else "model_0000003.pth"
    assert (folder / "last_checkpoint").read_text() == expected
    assert f"{expected}, the last whole checkpoint" in caplog.text


def test_one_that_is_missing_and_ones_that_are_all_cut_short_are_told(folder):
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    with pytest.raises(CheckpointError, match="is 'not there'"):
        last_whole_checkpoint(folder)
    for path in folder.glob("*.pth"):
        os.truncate(path, 500)
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(CheckpointError, match="start anew"):
        last_whole_checkpoint(folder)


def test_a_kill_at_the_first_checkpoint_leaves_none(folder):
    (folder / "last_checkpoint").unlink()
    (folder / "model_0000001.pth").unlink()
    os.truncate(folder / "model_0000003.pth", 500)
    assert last_whole_checkpoint(folder) is None


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_a_foreign_checkpoint_is_not_run_and_nobody_is_advised_to_trust_it(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": Hostile()}, path)
    with pytest.raises(CheckpointError, match="asks for exec") as of_weights:
        check_readable(path)
    assert "weights_only" not in str(of_weights.value)


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason="before torch 2.6 detectron2 runs what a checkpoint asks for"
)
def test_nor_is_one_that_a_run_resumes_from(tmp_path):
    torch.save({"model": Hostile()}, tmp_path / "x.pth")
    checkpointer = WholeCheckpointer(nn.Linear(2, 2), str(tmp_path))
    with (
        pytest.raises(CheckpointError, match="asks for exec") as raised,
        files_judged(checkpointer, lambda content: None),
    ):
        checkpointer.load(str(tmp_path / "x.pth"))
    assert "weights_only" not in str(raised.value)


def test_pickles_are_read_without_running_them(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    check_readable(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="unreadable"):
        check_readable(path)


def test_weights_that_lack_a_parameter_are_not_evaluated(tmp_path):
    torch.save({"model": {"weight": torch.ones(2, 2)}}, tmp_path / "x.pth")
    with pytest.raises(LookupError, match="lacks 1 parameters of the model, such as bias"):
        WholeCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "x.pth"))


def test_content_of_another_kind_is_one_line():
    with (
        pytest.raises(CheckpointError, match="record is 'of another kind'") as raised,
        using("record"),
    ):
        {}["plan"]["lr_rule"]
    assert "\n" not in str(raised.value)
