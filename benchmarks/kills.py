"""Kill ``d2scale train`` at random moments, resume it, and compare with the undisturbed run.

A third of the kills comes in the first three seconds, a third later (while ranks and loader workers
start, in a step, while a checkpoint is being written), a third between the last periodic checkpoint
and the end of the process (every second one while ``model_final.pth`` is being written).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS = 8
# Two steps lie between the last periodic checkpoint and the final one.
PERIODIC = ("model_0000002.pth", "model_0000005.pth")
FINAL = "model_final.pth"
METRICS = "metrics.json"
OPTIONS = (
    *("SOLVER.MAX_ITER", str(STEPS), "SOLVER.STEPS", "(6,)", "SOLVER.CHECKPOINT_PERIOD", "3"),
    *("SOLVER.IMS_PER_BATCH", "4", "MODEL.FPN.OUT_CHANNELS", "32"),
)
FIRST_SECONDS = 3.0
# Time that the other processes of a killed run have to end.
ENDED_SECONDS = 15.0
MOMENTS = (
    *("first", "starting", "end", "first", "writing", "final"),
    *("first", "loading", "end", "first", "step", "final"),
)
# Every third run has loader workers.
WORKERS = (0, 2, 0)
TARGETS = ("launcher", "rank", "group", "launcher", "rank", "group", "terminate", "interrupt")
# In the environment of all processes of a run.
_MARK = "BENCHMARK_KILLED_RUN"

Row = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """One kill: its number, the run, what is killed and when."""

    number: int
    ranks: int
    workers: int  # of the loader, for each rank
    moment: str  # one of MOMENTS
    target: str  # one of TARGETS


def killed(root: Path, kills: int, ranks: int) -> Row:
    """Kill as many runs on ``ranks`` ranks, each in a folder of its own; return what became of it.

    ``root`` holds ``recipe.yaml``. A line about every kill goes to standard error.
    """
    # A shell has what it starts in the background ignore Ctrl-C, and so all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(ranks)  # noqa: S311  no secret
    whole = root / f"undisturbed-{ranks}"
    began = time.time()
    run(root, whole, ranks)
    starting_seconds = (whole / "config.yaml").stat().st_mtime - began
    counts: Counter[str] = Counter()
    for number in range(kills):
        moment, target = MOMENTS[number % len(MOMENTS)], chance.choice(TARGETS)
        kill = Kill(number, ranks, WORKERS[number // 2 % len(WORKERS)], moment, target)
        process = start_and_wait(root, kill, starting_seconds, chance)
        found = kill_and_resume(root, kill, process, whole)
        print(json.dumps({**vars(kill), **found}), file=sys.stderr, flush=True)
        counts.update({name: int(value) for name, value in found.items() if name != "told"})
    return {
        "what": f"{ranks} rank{'s' * (ranks > 1)}, killed at random moments",
        "kills": kills,
        "inside a checkpoint": counts["inside"],
        "resumed": counts["resumed"],
        "equal": counts["equal"],
        "processes left": counts["left"],
        "passed": counts["resumed"] == counts["equal"] == kills and not counts["left"],
    }


def run(root: Path, folder: Path, ranks: int, *options: str) -> None:
    """Train to the end, without loader workers; RuntimeError if that fails."""
    process = start(root, folder, ranks, 0, *options)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(output[-1000:])


def start(
    root: Path, folder: Path, ranks: int, workers: int, *options: str
) -> subprocess.Popen[str]:
    """Start the command in a session of its own, as one that a terminal or a scheduler ends."""
    command = [
        *(sys.executable, "-m", "d2scale", "train", "--config-file", str(root / "recipe.yaml")),
        *("--num-gpus", str(ranks), *options, "OUTPUT_DIR", str(folder)),
        *("DATALOADER.NUM_WORKERS", str(workers), *OPTIONS),
    ]
    return subprocess.Popen(  # noqa: S603  d2scale's own command
        command,
        env={**os.environ, _MARK: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_and_wait(
    root: Path, kill: Kill, starting_seconds: float, chance: random.Random
) -> subprocess.Popen[str]:
    """Return a run at the moment of its kill; one that had ended by then is started again."""
    folder = folder_of(root, kill)
    while True:
        process = start(root, folder, kill.ranks, kill.workers)
        wait_for(kill.moment, folder, process, starting_seconds, chance)
        if process.poll() is None:
            return process
        process.communicate()
        shutil.rmtree(folder)


def folder_of(root: Path, kill: Kill) -> Path:
    return root / f"killed-{kill.ranks}-{kill.number}"


def kill_and_resume(
    root: Path, kill: Kill, process: subprocess.Popen[str], whole: Path
) -> dict[str, Any]:
    folder = folder_of(root, kill)
    send(kill.target, process)
    left = wait_for_end(folder)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    inside = any(folder.glob(".model*.partial"))
    # A folder without a checkpoint takes the same command again.
    resumes = any(folder.glob("model_*.pth")) or kill.number % 2
    told, equal = "", False
    try:
        run(root, folder, kill.ranks, *["--resume"] * bool(resumes))
        equal = is_whole(folder) and same_weights(folder, whole)
    except RuntimeError as error:
        told = str(error)
    if equal:
        shutil.rmtree(folder)
    return {
        "status": process.returncode,
        "inside": inside,
        "left": len(left),
        "resumed": not told,
        "equal": equal,
        "told": told,
    }


def wait_for(
    moment: str,
    folder: Path,
    process: subprocess.Popen[str],
    starting_seconds: float,
    chance: random.Random,
) -> None:
    """Return at a random moment of this kind, or when the process has ended."""
    if moment == "first":
        time.sleep(chance.uniform(0, FIRST_SECONDS))
    elif moment == "starting":
        time.sleep(chance.uniform(FIRST_SECONDS, starting_seconds))
    elif moment == "loading":
        wait_until(process, (folder / "config.yaml").exists)
        time.sleep(chance.uniform(0, FIRST_SECONDS))
    elif moment in ("step", "end"):
        first, last = (1, STEPS - 3) if moment == "step" else (STEPS - 2, STEPS)
        steps = chance.randint(first, last)
        wait_until(process, lambda: steps_in(folder) >= steps)
        time.sleep(chance.uniform(0, 0.3))
    else:
        name = FINAL if moment == "final" else chance.choice(PERIODIC)
        wait_until(process, lambda: any(folder.glob(f".{name}.*.partial")))
        time.sleep(chance.uniform(0, 0.03))


def steps_in(folder: Path) -> int:
    metrics = folder / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def send(target: str, process: subprocess.Popen[str]) -> None:
    """Kill the launcher, the last rank that it has started, or all processes of the run."""
    ranks = children(process.pid) if target == "rank" else []
    with_all = target in ("group", "interrupt")
    number = {"terminate": signal.SIGTERM, "interrupt": signal.SIGINT}.get(target, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it has just ended
        if with_all:
            os.killpg(process.pid, number)
        else:
            os.kill(ranks[-1] if ranks else process.pid, number)


def children(parent: int) -> list[int]:
    """Return the ranks that a launcher has started."""
    listed = of_process(parent, f"task/{parent}/children").split()
    return [pid for pid in map(int, listed) if b"spawn_main" in of_process(pid, "cmdline")]


def wait_for_end(folder: Path) -> list[int]:
    """Return which processes of a run are left after a while."""
    deadline = time.monotonic() + ENDED_SECONDS
    mark = f"{_MARK}={folder}".encode()
    while left := [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and mark in of_process(int(entry.name), "environ").split(b"\0")
    ]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []


def of_process(pid: int, name: str) -> bytes:
    """Return a file of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def is_whole(folder: Path) -> bool:
    """Return whether a run's folder holds all that an undisturbed one has, each step once."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return (
        (folder / "last_checkpoint").read_text() == FINAL
        and not any(folder.glob("*.partial"))
        and [line["iteration"] for line in lines] == list(range(STEPS))
    )


def load(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / FINAL, weights_only=True)
    return content


def same_weights(folder: Path, expected: Path) -> bool:
    """Return whether two final models have the same bits."""
    found, weights = load(folder)["model"], load(expected)["model"]
    return found.keys() == weights.keys() and all(
        torch.equal(found[name], value) for name, value in weights.items()
    )
