from __future__ import annotations

import datetime

import pytest
import torch

from d2scale.engine.checkpoint import checkpointer as module
from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.checkpoint.files import read_checkpoint
from d2scale.errors import CheckpointError
from d2scale.planning.progress import FORMAT
from standins import StandIn


@pytest.fixture
def run(tmp_path):
    model = StandIn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    saver = RunCheckpointer(model, tmp_path, optimizer=optimizer)
    saver.facts = {"batch": 4}
    saver.save("model_0000004", iteration=4, images_seen=20, sampler={})
    return saver


def resumer(folder, seed=1):
    model = StandIn(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return RunCheckpointer(model, folder, optimizer=optimizer)


def resume(checkpointer):
    last = checkpointer.read_last()
    if last is None:
        return None
    checkpointer.load(*last)
    return last[1]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(run, tmp_path):
    other = resumer(tmp_path)
    content = resume(other)
    assert content["iteration"] == 4
    assert content["d2scale"] == {"format": FORMAT, "batch": 4}
    for name, value in run.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    momentum = other.checkpointables["optimizer"].state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones_like(momentum))
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000004.pth", "last_checkpoint"}


def test_nothing_to_resume(tmp_path):
    assert resume(resumer(tmp_path)) is None


def test_other_ranks_write_nothing(tmp_path):
    RunCheckpointer(StandIn(), tmp_path, writes=False).save("model_final")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    def fill_the_disk(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", fill_the_disk)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        run.save("model_0000009", iteration=9, images_seen=40, sampler={})
    one_line(caught)
    monkeypatch.undo()
    assert resume(resumer(tmp_path))["iteration"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000004.pth", "last_checkpoint"}


def test_kill_while_writing_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(data, file):
        file.write(b"half")
        raise Killed

    monkeypatch.setattr(module.torch, "save", die)
    with pytest.raises(Killed):
        run.save("model_0000004", iteration=5, images_seen=24, sampler={})
    monkeypatch.undo()
    assert resume(resumer(tmp_path))["iteration"] == 4


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_truncated(run, tmp_path, size):
    path = tmp_path / "model_0000004.pth"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model_0000004\.pth is 'unreadable'") as caught:
        resume(resumer(tmp_path))
    one_line(caught)


def test_missing(run, tmp_path):
    (tmp_path / "model_0000004.pth").unlink()
    with pytest.raises(CheckpointError, match=r"model_0000004\.pth is 'not there'") as caught:
        resume(resumer(tmp_path))
    one_line(caught)


def test_python_objects_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {}, "when": datetime.timedelta(1)}, path)
    with pytest.raises(CheckpointError, match="unreadable") as caught:
        read_checkpoint(path)
    one_line(caught)


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="without a model"):
        read_checkpoint(path)


def foreign(run, folder, **more):
    """What detectron2 writes: no record, no images seen."""
    state = {"model": run.model.state_dict(), **more}
    torch.save(state, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")


def test_weights_alone_are_no_training(run, tmp_path):
    foreign(run, tmp_path)
    with pytest.raises(CheckpointError, match=r"without iteration.*set MODEL\.WEIGHTS to it") as e:
        resume(resumer(tmp_path))
    one_line(e)


def test_checkpoint_without_a_record_keeps_an_optimizer_that_fits(run, tmp_path):
    optimizer = run.checkpointables["optimizer"].state_dict()
    foreign(run, tmp_path, iteration=9, optimizer=optimizer, scheduler={"last_epoch": 10})
    other = resumer(tmp_path)
    assert resume(other)["iteration"] == 9
    state = other.checkpointables["optimizer"].state_dict()
    assert torch.equal(
        state["state"][0]["momentum_buffer"], optimizer["state"][0]["momentum_buffer"]
    )


def test_checkpoint_without_a_record_drops_an_optimizer_of_another_order(run, tmp_path, caplog):
    optimizer = run.checkpointables["optimizer"].state_dict()
    optimizer["state"] = {key: optimizer["state"][7 - key] for key in range(8)}
    foreign(run, tmp_path, iteration=9, optimizer=optimizer)
    other = resumer(tmp_path)
    resume(other)
    assert other.checkpointables["optimizer"].state_dict()["state"] == {}
    assert "does not fit" in caplog.text
    assert "it starts anew" in caplog.text


def test_settings_of_the_optimizer_are_the_configs(run, tmp_path):
    other = resumer(tmp_path)
    resume(other)
    assert other.checkpointables["optimizer"].param_groups[0]["lr"] == 0.5


def test_the_one_before_a_truncated_one_is_used(run, tmp_path, caplog):
    for iteration in (2, 9):
        images = 4 * (iteration + 1)
        run.save(f"model_000000{iteration}", iteration=iteration, images_seen=images, sampler={})
    path = tmp_path / "model_0000009.pth"
    path.write_bytes(path.read_bytes()[:-100])
    assert resume(resumer(tmp_path))["iteration"] == 4
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "model_0000009.pth is 'unreadable'" in line
    assert line.endswith("going on from model_0000004.pth")


def test_the_first_checkpoint_counts_although_a_kill_kept_its_name_from_being_noted(run, tmp_path):
    (tmp_path / "last_checkpoint").unlink()
    assert resume(resumer(tmp_path))["iteration"] == 4


def test_all_truncated(run, tmp_path):
    run.save("model_0000009", iteration=9, images_seen=40, sampler={})
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model_0000009\.pth is 'unreadable'") as caught:
        resume(resumer(tmp_path))
    one_line(caught)
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"model_0000009\.pth is 'unreadable'"):
        resume(resumer(tmp_path))


def test_a_checkpoint_that_is_only_read_changes_nothing(run, tmp_path):
    other = resumer(tmp_path)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    other.read_last()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert other.checkpointables["optimizer"].state_dict()["state"] == {}


def test_newer_format(run, tmp_path):
    path = tmp_path / "model_0000004.pth"
    content = torch.load(path, weights_only=True)
    content["d2scale"]["format"] = FORMAT + 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="update d2scale"):
        resume(resumer(tmp_path))


def test_other_model_is_told_by_its_keys(run, tmp_path):
    other = resumer(tmp_path)
    other.model.extra = torch.nn.Linear(2, 2)
    del other.model.norm
    other.model.score = torch.nn.Linear(5, 1)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        resume(other)
    text = str(caught.value)
    assert "2 keys that the model lacks: norm.weight, norm.bias" in text
    assert "2 keys that it lacks: extra.weight, extra.bias" in text
    assert "1 shapes that differ: score.weight (1, 4) for (1, 5)" in text
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_optimizer_of_another_shape(run, tmp_path):
    other = resumer(tmp_path)
    other.checkpointables["optimizer"].add_param_group({"params": [torch.nn.Parameter()]})
    with pytest.raises(CheckpointError, match="optimizer in") as caught:
        resume(other)
    one_line(caught)
