from __future__ import annotations

from types import SimpleNamespace

import torch

from d2scale.engine.telemetry import machine
from d2scale.engine.telemetry.machine import describe_machine


def test_a_cpu_has_no_device_memory(monkeypatch, tmp_path):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    monkeypatch.setattr(machine, "_CPU_FACTS", facts)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 6)
    found = describe_machine(torch.device("cpu"))
    assert found["description"] == "Some CPU @ 2 GHz, 6 cores, no GPU used"
    assert (found["device"], found["processes"]) == ("cpu", 1)
    assert "device_memory_mb" not in found


def test_a_machine_that_does_not_name_its_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CPU_FACTS", tmp_path / "nothing")
    assert describe_machine(torch.device("cpu"))["cpu"]


def test_a_gpu_is_told_with_its_memory(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", total_memory=16 * 2**30, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = describe_machine(torch.device("cuda", 0))
    assert found["description"] == "1 x Some GPU, 16.0 GiB each"
    assert (found["device"], found["device_memory_mb"]) == ("Some GPU", 16 * 1024)
    assert found["tf32"] == "convolutions"
