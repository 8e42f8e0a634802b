"""Does a training on two machines end in one line, whatever happens to one of them?

    python benchmarks/lost_machines.py [--only WORD]

Network namespaces stand for the machines; it needs the right to make them. ``d2scale train`` is
started on both, on CPUs, on drawn shapes: machines are killed, frozen, cut off or never come, or
were given something else than the other. A row for each machine that is left: seconds to its end,
from the accident or else from the moment when the last process had imported its packages, its exit
status and its one line. Prints a table and keeps it, with the machine that it was made on, in
results/lost_machines.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills import same_weights
from machine import keep, table_of
from namespaces import Machine, cluster
from resume import RECIPE

from d2scale.coco.shapes import write_shapes_dataset

LIMIT_SECONDS = 60.0
GIVE_UP_SECONDS = 240.0
JOIN_SECONDS = 20
PORT = 29500
OWN_DATA = """
D2GO_DATA: {DATASETS: {COCO_INJECTION: {NAMES: [mine], IM_DIRS: ["%s"], JSON_FILES: ["%s"]}}}
"""
ENDLESS = ("SOLVER.MAX_ITER", "1000000", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "0")
# Two virtual ranks, whose gradients are added in order, give the same bits on any number of GPUs.
SAME_BITS = (
    *("SOLVER.REFERENCE_WORLD_SIZE", "2", "D2SCALE.EXACT", "False"),
    *("D2SCALE.VIRTUAL_RANKS", "on", "D2SCALE.ORDERED_SUM", "True", "SOLVER.MAX_ITER", "6"),
    *("SOLVER.STEPS", "()"),
)

Row = dict[str, Any]


def kill(machine: Machine) -> None:
    """End it like a power cut: the others get no packet any more, not even of the end."""
    machine.cut_off()
    machine.kill()


def freeze(machine: Machine) -> None:
    machine.signal(signal.SIGSTOP)


@dataclass(frozen=True)
class Case:
    """What happens to two machines, and the line in which those end that are left."""

    what: str
    line: str  # a pattern
    accident: Callable[[Machine], None] | None = None  # once both train
    victim: int = 1  # the machine that it happens to, or that is absent
    absent: bool = False
    words: tuple[str, ...] = ()  # of the command on machine 1
    versions: str = ""  # that machine 1 pretends to have: MODULE=VERSION

    def left(self) -> list[int]:
        """Return the machines that are expected to end by themselves."""
        gone = self.absent or self.accident is kill
        return [number for number in (0, 1) if not (gone and number == self.victim)]


def lost(number: int) -> str:
    return f"machine {number} of 2 has not been heard of for"


def differs(key: str, of: str = "rank") -> str:
    return f"{re.escape(key)} on {of} 1 is "


def cases(root: Path) -> Iterator[Case]:
    for number in (1, 0):
        yield Case(f"machine {number} killed", lost(number), kill, number)
    yield Case("link down", lost(0) + "|" + lost(1), Machine.cut_off)
    for number in (1, 0):
        line = f"{lost(0)}|{lost(1)}|machine . of 2 has ended"
        yield Case(f"machine {number} frozen", line, freeze, number)
    for number in (1, 0):
        line = f"waited {JOIN_SECONDS} s for machine {number} of 2"
        yield Case(f"machine {number} absent", line, victim=number, absent=True)
    for key, value in (("BASE_LR", "0.002"), ("IMS_PER_BATCH", "4"), ("MAX_ITER", "99")):
        name = f"SOLVER.{key}"
        yield Case(f"other {name}", differs(name), words=(name, value))
    yield Case("other --method", differs("--method"), words=("--method", "per_gpu"))
    yield Case("other --num-gpus", differs("--num-gpus", "machine"), words=("--num-gpus", "2"))
    for kind in ("images", "boxes", "classes"):
        path = f'["{root / kind}.json"]'
        words = ("D2GO_DATA.DATASETS.COCO_INJECTION.JSON_FILES", path)
        yield Case(f"other {kind}", differs(f"{kind} of mine"), words=words)
    for package in ("d2scale", "torch"):
        line = differs(f"version of {package}", "machine")
        yield Case(f"other version of {package}", line, versions=f"{package}=2.99.0")


def write_data(root: Path) -> None:
    """Write drawn shapes as own data, and annotations of them with one thing changed each."""
    data = write_shapes_dataset(root / "data", 12, 1, image_size=(64, 96), only_drawn=True)
    json_file = data / "coco/annotations/instances_train2017.json"
    for kind in ("images", "boxes", "classes"):
        content = json.loads(json_file.read_bytes())
        if kind == "images":
            gone = content["images"].pop()["id"]
            entries = [e for e in content["annotations"] if e["image_id"] != gone]
            content["annotations"] = entries
        elif kind == "boxes":
            content["annotations"][0]["bbox"][2] -= 1
        else:
            content["categories"][0]["name"] = "another"
        (root / f"{kind}.json").write_text(json.dumps(content))
    own = OWN_DATA % (data / "coco/train2017", json_file)
    recipe = RECIPE.replace("DATASETS: {", "DATASETS: {TRAIN: [mine], ").replace("[64, 72]", "[64]")
    (root / "recipe.yaml").write_text(recipe + own)


class Trial:
    """``d2scale train`` on two machines, with a folder and a log for each."""

    def __init__(self, machines: list[Machine], root: Path, name: str) -> None:
        self.machines, self.root, self.name = machines, root, name
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def folder(self, number: int) -> Path:
        return self.root / f"{self.name}-{number}".replace(" ", "-")

    def said(self, number: int) -> str:
        return Path(f"{self.folder(number)}.log").read_text()

    def start(self, number: int, *words: str, host: str = "", versions: str = "") -> None:
        url = f"tcp://{host or self.machines[0].address}:{PORT}"
        numbers = ("--num-machines", str(len(self.machines)), "--machine-rank", str(number))
        options = (*numbers, "--dist-url", url, "--join-timeout", str(JOIN_SECONDS))
        command = (__file__, "train", "--config-file", str(self.root / "recipe.yaml"), *options)
        log = Path(f"{self.folder(number)}.log")
        variables = {"VERSIONS": versions, "IMPORTED": str(self.marks)}
        self.processes[number] = self.machines[number].start(
            *command, "OUTPUT_DIR", str(self.folder(number)), *words, log=log, **variables
        )

    def trains(self) -> bool:
        """Return whether a step has been taken; RuntimeError if the training has ended."""
        if ended := [n for n, process in self.processes.items() if process.poll() is not None]:
            raise RuntimeError(self.said(ended[0])[-2000:])
        metrics = self.folder(0) / "metrics.json"
        return metrics.exists() and metrics.read_text().count("\n") >= 2

    def seconds_until_ends(self, numbers: list[int]) -> dict[int, float]:
        """Wait for the machines; those that do not end are left out."""
        began, ended = time.time(), {}
        while len(ended) < len(numbers) and time.time() - began < GIVE_UP_SECONDS:
            for number in numbers:
                if number not in ended and self.processes[number].poll() is not None:
                    ended[number] = time.time()
            time.sleep(0.05)
        began = max([began, *(f.stat().st_mtime for f in self.root.glob(f"{self.marks.name}.*"))])
        return {number: end - began for number, end in ended.items()}

    @property
    def marks(self) -> Path:
        """Beginning of the names of files that processes make which have imported all packages."""
        return self.root / f"{self.name}-imported".replace(" ", "-")


def run(case: Case, root: Path) -> list[Row]:
    with cluster(2) as machines:
        trial = Trial(machines, root, case.what)
        for number in (0, 1):
            if not (case.absent and number == case.victim):
                words, versions = (case.words, case.versions) if number else ((), "")
                trial.start(number, *ENDLESS, *words, versions=versions)
        if case.accident is None:
            seconds = trial.seconds_until_ends(case.left())
        else:
            wait_until(trial.trains)
            case.accident(machines[case.victim])
            waits = [n for n in case.left() if case.accident is not freeze or n != case.victim]
            seconds = trial.seconds_until_ends(waits)
            if case.accident is freeze:
                machines[case.victim].signal(signal.SIGCONT)
                seconds |= trial.seconds_until_ends([case.victim])
        return [row(case, trial, number, seconds.get(number)) for number in case.left()]


def row(case: Case, trial: Trial, number: int, seconds: float | None) -> Row:
    output, status = trial.said(number), trial.processes[number].poll()
    errors = re.findall(r"^d2scale: error: (.*)$", output, re.MULTILINE)
    fits = len(errors) == 1 and re.match(case.line, errors[0]) and "Traceback" not in output
    return {
        "key": f"{case.what}: {number}",
        "what": case.what,
        "on": f"machine {number}",
        "seconds": None if seconds is None else round(seconds, 1),
        "status": status,
        "lines": len(errors),
        "says": "; ".join(errors)[:160] or output.strip().rpartition("\n")[2][:160],
        "passed": bool(fits and status == 2 and seconds and seconds <= LIMIT_SECONDS),
    }


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + GIVE_UP_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError("the training has not begun")
        time.sleep(0.05)


def undisturbed(root: Path, *, loopback: bool) -> list[Row]:
    """Train on two machines, perhaps of names with loopback addresses, and compare with one."""
    what = "host names on loopback" if loopback else "nothing happens"
    with cluster(1) as machines:
        alone = Trial(machines, root, f"{what}, alone")
        alone.start(0, *SAME_BITS)
        alone.seconds_until_ends([0])
    with cluster(2) as machines:
        trial, host = Trial(machines, root, what), machines[0].host_name if loopback else ""
        for number, machine in enumerate(machines):
            if loopback:
                machine.hosts = root / f"hosts{number}"
                names = ["127.0.0.1 localhost", f"127.0.1.1 {machine.host_name}"]
                names += [f"{machines[0].address} {host}"] * number
                machine.hosts.write_text("\n".join(names) + "\n")
            trial.start(number, *SAME_BITS, host=host)
        seconds = trial.seconds_until_ends([0, 1])
    statuses = [process.poll() for process in trial.processes.values()]
    same = not any(statuses) and same_weights(trial.folder(0), alone.folder(0))
    words = "weights bit-equal to those of one machine" if same else trial.said(0)[-160:]
    facts = {"seconds": round(max(seconds.values(), default=0), 1), "status": statuses[0]}
    return [{"key": what, "what": what, "on": "both", **facts, "says": words, "passed": same}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has it")
    wanted = parser.parse_args().only
    try:
        with cluster(1):
            pass
    except OSError as error:
        sys.exit(f"network namespaces are not permitted here: {error}")
    with tempfile.TemporaryDirectory(prefix="d2scale-") as name:
        root = Path(name)
        write_data(root)
        runs = {c.what: (lambda c=c: run(c, root)) for c in cases(root)}
        for loopback, what in ((False, "nothing happens"), (True, "host names on loopback")):
            runs[what] = lambda loopback=loopback: undisturbed(root, loopback=loopback)
        chosen = [what for what in runs if wanted in what]
        if not chosen:
            parser.error(f"--only is {wanted!r}; allowed: a word of {', '.join(runs)}")
        for what in chosen:
            rows = runs[what]()
            print(table_of(rows), flush=True)
            every = keep("lost_machines", rows, "key")
    print(table_of(every))


def prepare_process() -> None:
    """In a process of a machine: the versions that it pretends to have, and a mark of its start."""
    for pair in filter(None, os.environ.get("VERSIONS", "").split()):
        module, _, version = pair.partition("=")
        found = importlib.import_module(module)
        found.__version__ = type(found.__version__)(version)
    if "IMPORTED" in os.environ:
        Path(f"{os.environ['IMPORTED']}.{os.getpid()}").touch()


if __name__ in ("__main__", "__mp_main__"):
    prepare_process()
if __name__ == "__main__":
    if "VERSIONS" in os.environ:
        from d2scale import cli

        sys.exit(cli.main(sys.argv[1:]))
    main()
