"""The benchmarks of DataParallel and of accumulation compare what they say they compare."""

from __future__ import annotations

import re
import sys

import accumulation
import data_parallel
import pytest
import torch
from split_steps import medians, new_model, recipe

pytestmark = pytest.mark.usefixtures("warm_ranks")


@pytest.fixture
def cfg(one_thread):
    with recipe() as cfg:
        yield cfg


def test_the_stand_in_trains_what_dataparallel_trains(cfg):
    """Its gradient is the mean over the devices, and each weight crosses once each way."""
    batch = data_parallel.make_batch(4)
    model, optimizer = data_parallel._model_and_optimizer(cfg)
    runner = data_parallel.ThreadedDataParallel(model, optimizer, 2)
    runner(batch)
    runner.close()
    found = [parameter.grad for parameter in model.parameters()]
    alone = data_parallel.OnTensors(new_model(cfg))
    halves = zip(*(tensor.chunk(2) for tensor in batch), strict=True)
    torch.stack([alone(*half) for half in halves]).mean().backward()
    for gradient, parameter in zip(found, alone.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    other = sum(tensor.nbytes for tensor in batch) / 2
    assert runner.copied_bytes == pytest.approx(2 * weights + other, rel=1e-4)


def test_the_first_device_holds_more_than_the_others(monkeypatch, one_thread):
    monkeypatch.setattr(data_parallel, "IMAGE", (32, 32))
    rows = {row["way"]: row for row in data_parallel.run(2, 4, 1)}
    assert len(rows) == 4
    first, *others = rows.values()
    assert first["devices"] == 1
    assert all(row["s a step"] > 0 for row in rows.values())
    threads = rows["DataParallel, stand-in of threads"]
    assert threads["first device MB"] > threads["other devices MB"]
    for row in others[1:]:
        assert row["first device MB"] == pytest.approx(row["other devices MB"], rel=0.01)


@pytest.mark.parametrize(
    "words", [("--images", "15"), ("--devices", "1"), ("--images", "0"), ("--steps", "0")]
)
def test_images_that_do_not_divide_are_refused(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["data_parallel.py", *words])
    with pytest.raises(SystemExit, match="2"):
        data_parallel.main()
    assert re.search(f"{words[0]} (is )?{words[1]}[ ;]", capsys.readouterr().err)


def test_once_a_step_sends_a_part_of_the_bytes_for_the_same_gradient(monkeypatch, one_thread):
    monkeypatch.setattr(accumulation, "IMAGE", (32, 32))
    rows = accumulation.run([accumulation.NARROW_NAME], 2, 3, 1)
    every, *once = rows
    assert every["way"] == accumulation.EVERY
    for row in once:
        assert row["MB a step"] == pytest.approx(every["MB a step"] / 3, rel=0.01)
        assert row["all-reduces"] < every["all-reduces"]
        assert row["gradient's distance"] < 1e-4


def test_a_step_is_timed_until_the_gpu_is_done(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("GPU is done"))
    medians([lambda: calls.append("step")], 1)
    assert calls == ["step", "GPU is done"] * 3
