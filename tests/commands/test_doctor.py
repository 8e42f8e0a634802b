import resource
import shutil
import socket
from types import SimpleNamespace

import torch

from d2scale.commands.doctor import diagnose


def test_the_report_names_what_matters():
    lines = dict(line.split(":", 1) for line in diagnose().splitlines())
    assert {"d2scale", "Python", "torch", "detectron2", "devices", "datasets"} <= set(lines)
    assert "CUDA" in lines["devices"] or "GiB" in lines["devices"]


def address_of_the_host(monkeypatch, address):
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    (line,) = [line for line in diagnose().splitlines() if line.startswith("host:")]
    return line


def test_a_name_by_which_no_machine_finds_this_one_is_told(monkeypatch):
    assert "--local-addr" in address_of_the_host(monkeypatch, "127.0.1.1")
    assert "--local-addr" not in address_of_the_host(monkeypatch, "198.18.0.1")


def line_of(name):
    (line,) = [line for line in diagnose().splitlines() if line.startswith(f"{name}:")]
    return line


TOLD = ("shared memory", "open files", "processes", "free disk", "temporary")


def test_little_shared_memory_few_files_and_a_full_disk_are_told(monkeypatch):
    usage = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 4096))
    assert "0.06 GiB free; " in line_of("shared memory")
    assert "--shm-size" in line_of("shared memory")
    assert "at most 64; raise it with ulimit -n 4096" in line_of("open files")
    assert "0.1 GiB here; " in line_of("free disk")
    assert "at most 64; raise it with ulimit -u" in line_of("processes")
    usage.free = 2**20
    assert "set TMPDIR" in line_of("temporary")


def test_folders_that_cannot_be_written_are_told(monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "set TMPDIR" in line_of("temporary")
    assert "set OUTPUT_DIR" in line_of("free disk")


def test_enough_of_everything_is_told_without_advice(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4096, 4096))
    assert not any(";" in line_of(name) for name in TOLD)


def test_a_gpu_is_named_with_what_its_float32_is(monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", total_memory=16 * 2**30, major=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert "Some GPU, 16.0 GiB, TF32 for convolutions" in diagnose()
