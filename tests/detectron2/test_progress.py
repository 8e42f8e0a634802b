"""Which checkpoints detectron2's loop goes on with."""

import pytest
import torch
from torch import nn

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer

WRITERS = ("default", "d2go", "config", "lazy")


@pytest.fixture
def model():
    return nn.Linear(1, 1)


def checkpointer_of(kind, model, folder, cfg):
    """Return a checkpointer as an engine builds it, and its optimizer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import DefaultTrainer, SimpleTrainer

    from d2scale.detectron2.progress import ProgressRecord, resume_by_images

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    if kind == "default":
        own = RunCheckpointer(model, folder, optimizer=optimizer)
        own.facts = {"engine": "default"}
        return own
    own = {"optimizer": optimizer}
    if kind in ("config", "lazy"):
        trainer = SimpleTrainer(model, [], optimizer)
        trainer.iter = 1
        if kind == "config":
            inner, trainer = trainer, DefaultTrainer.__new__(DefaultTrainer)
            trainer._hooks, trainer._trainer, trainer.iter = [], inner, 1
        own = {"trainer": trainer}
    record = ProgressRecord(cfg, engine="d2go" if kind == "d2go" else "detectron2")
    checkpointer = DetectionCheckpointer(model, str(folder), d2scale=record, **own)
    resume_by_images(checkpointer, record, optimizer, None, 10, own.get("trainer"))
    return checkpointer


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", WRITERS[1:])
def test_a_checkpoint_without_the_optimizer_where_it_is_looked_for_is_refused(
    writer, reader, model, tmp_path, capsys
):
    from detectron2.config import get_cfg

    from d2scale.detectron2.config import with_d2scale_keys

    cfg = with_d2scale_keys(get_cfg())
    progress = {"images_seen": 32, "sampler": {}} if writer == "default" else {}
    checkpointer_of(writer, model, tmp_path, cfg).save("model_1", iteration=1, **progress)
    own = nn.Linear(1, 1)
    resuming = checkpointer_of(reader, own, tmp_path, cfg)
    before = own.weight.item()
    if reader == writer:
        assert resuming.resume_or_load("", resume=True)["iteration"] == 1
        assert own.weight.item() == model.weight.item()
        return
    with pytest.raises(SystemExit, match="2"):
        resuming.resume_or_load("", resume=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2scale: error: writer of the checkpoint")
    assert own.weight.item() == before


def test_a_checkpoint_of_a_run_without_d2scale_is_of_the_same_kind(model, tmp_path):
    from detectron2.config import get_cfg

    from d2scale.detectron2.config import with_d2scale_keys

    cfg = with_d2scale_keys(get_cfg())
    plain = checkpointer_of("lazy", model, tmp_path, cfg)
    del plain.checkpointables["d2scale"]
    plain.save("model_1", iteration=1)
    resuming = checkpointer_of("lazy", nn.Linear(1, 1), tmp_path, cfg)
    assert resuming.resume_or_load("", resume=True)["iteration"] == 1
