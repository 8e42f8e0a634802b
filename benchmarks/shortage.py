"""Does a training that runs short of disk, shared memory or files end in one line, or train?

    python benchmarks/shortage.py [--only disk shm files read-only commands]

Runs `d2scale train`, and other commands that write, in mount namespaces of their own: a disk with
so many bytes left, a small /dev/shm, few open files, folders that cannot be written.
Each must train or end with status 2 and one line, in time, and after the disk has been full
`--resume` must end with the weights of an undisturbed training. Needs the right to mount (root, or
a container with it) and Linux. Prints a table and keeps it in results/shortage.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import keep, table_of
from resume import RECIPE

from d2scale.coco.shapes import write_shapes_dataset

DEADLINE_SECONDS = 240
CHECKPOINT_BYTES = 24_812_419  # of the model of RECIPE, with its optimizer
DISK_MIB = 400
# What a training of six steps writes before its first checkpoint fits into 64 KiB.
SPACES = {
    "at the start": 0,
    "after 4 KiB (log)": 2**12,
    "after 8 KiB (TensorBoard)": 2**13,
    "after 16 KiB (config.yaml, plan.json)": 2**14,
    "after 24 KiB (before the first checkpoint)": 3 * 2**13,
    "in the first checkpoint": CHECKPOINT_BYTES // 2,
    "after the first checkpoint": CHECKPOINT_BYTES + 2**16,
    "in the second checkpoint": CHECKPOINT_BYTES * 3 // 2,
    "in the third checkpoint": CHECKPOINT_BYTES * 5 // 2,
    "in model_final.pth": CHECKPOINT_BYTES * 7 // 2,
    "in the results (inference/)": CHECKPOINT_BYTES * 4 + 9 * 2**12,
    "never": CHECKPOINT_BYTES * 5,
}
FOR_TWO_RANKS = ("at the start", "after 8 KiB (TensorBoard)", "in the second checkpoint", "never")
SHORT = "SOLVER.MAX_ITER 6 SOLVER.STEPS (4,) DATASETS.TEST ('coco_pretrain_val_base',)"
SMALL_REAL_SIZE = (
    "MODEL.FPN.OUT_CHANNELS 32 "
    "INPUT.MIN_SIZE_TRAIN (800,) INPUT.MAX_SIZE_TRAIN 1333 SOLVER.IMS_PER_BATCH 16 "
    "SOLVER.MAX_ITER 1 SOLVER.STEPS () SOLVER.CHECKPOINT_PERIOD 0 D2SCALE.EXACT False "
    "DATALOADER.NUM_WORKERS 4"
)
WITH_FILES = (
    "SOLVER.MAX_ITER 3 SOLVER.STEPS (2,) SOLVER.CHECKPOINT_PERIOD 0 DATALOADER.NUM_WORKERS {}"
)
FILES = (
    (64, 1, 0),
    (64, 1, 4),
    (64, 2, 0),
    (64, 2, 4),
    (20, 1, 4),
    (20, 2, 0),
)  # limit, ranks, workers

OF_A_SHORTAGE = (
    "No space left",
    "shared memory",
    "open files",
    "cannot be written to",
)

Row = dict[str, Any]


class Bench:
    """A recipe, its dataset and what an undisturbed training of it ends with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        write_shapes_dataset(root / "data", 32, 2, image_size=(64, 96))
        write_shapes_dataset(root / "large", 32, 2, image_size=(800, 1333))
        self.disk = root / "disk"
        self.disk.mkdir()
        self.whole: dict[int, dict[str, torch.Tensor]] = {}

    def train(self, ranks: int, settings: str, folder: str | Path, options: str = "") -> str:
        """Return the command of a training."""
        words = ["d2scale", "train", "--config-file", self.recipe, "--num-gpus", ranks]
        words += [*options.split(), "OUTPUT_DIR", folder, *settings.split()]
        return shlex.join(map(str, [sys.executable, "-m", *words]))

    def run(self, what: str, script: str, data: str = "data") -> Row:
        """Run a shell script in a namespace; return how it ended."""
        variables = {"DETECTRON2_DATASETS": self.data_of(data), "HOME": str(self.root)}
        try:
            done = subprocess.run(  # noqa: S603
                ["unshare", "--mount", "sh", "-c", script],  # noqa: S607
                env={**os.environ, **variables},
                capture_output=True,
                text=True,
                timeout=DEADLINE_SECONDS,
                cwd=self.root,
            )
        except subprocess.TimeoutExpired:
            return {
                "what": what,
                "ended": f"FAILS: hangs for {DEADLINE_SECONDS} s",
                "passed": False,
            }
        ended = judged(done.returncode, done.stdout + done.stderr)
        return {"what": what, "ended": ended, "passed": not ended.startswith("FAILS")}

    def data_of(self, data: str) -> str:
        real = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute()
        has_coco = (real / "coco/annotations/instances_train2017.json").is_file()
        return str(real if data == "large" and has_coco else self.root / data)

    def final(self, ranks: int) -> dict[str, torch.Tensor]:
        """Return the weights of a training that nothing disturbs."""
        if ranks not in self.whole:
            folder = self.root / f"whole{ranks}"
            self.run("undisturbed", self.train(ranks, SHORT, folder))
            self.whole[ranks] = weights_of(folder)
        return self.whole[ranks]


def judged(status: int, output: str) -> str:
    """Return in words how a command has ended; a failure begins with FAILS."""
    mistakes = [line for line in output.splitlines() if line.startswith("d2scale: error: ")]
    if "Traceback" in output or "Logging error" in output:
        return f"FAILS: a traceback, status {status}"
    if status == 0:
        return "trains" if not mistakes else "FAILS: an error, but status 0"
    if status != 2 or len(set(mistakes)) != 1:
        return f"FAILS: status {status}, {len(mistakes)} lines: {output[-300:]}"
    if not any(word in mistakes[0] for word in OF_A_SHORTAGE):
        return f"FAILS: another mistake: {mistakes[0]}"
    return mistakes[0].removeprefix("d2scale: error: ")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "model_final.pth", weights_only=True)
    return dict(content["model"])


def full_disk(bench: Bench) -> Iterator[Row]:
    for ranks in (1, 2):
        for when, space in SPACES.items():
            if ranks == 2 and when not in FOR_TWO_RANKS:
                continue
            kept, disk = bench.root / f"kept{ranks}-{space}", bench.disk
            fill = mounted(disk, f"{DISK_MIB}m") + f"head -c {DISK_MIB * 2**20 - space} /dev/zero"
            fill += f" > {disk}/filler; mkdir {disk}/run\n"
            resume = bench.train(ranks, SHORT, disk / "run", "--resume")
            after = f"status=$?; rm {disk}/filler; {resume} > {disk}/resumed 2>&1; "
            after += f"cp -r {disk}/run {kept}; exit $status"
            command = bench.train(ranks, SHORT, disk / "run")
            row = bench.run(f"disk full {when}, {ranks} ranks", f"{fill}{command}\n{after}")
            row["resumed"] = same(kept, bench.final(ranks))
            row["passed"] = row["passed"] and row["resumed"] == "same weights"
            yield row


def same(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    if not (folder / "model_final.pth").exists():
        return "FAILS: no model_final.pth"
    found = weights_of(folder)
    equal = all(torch.equal(found[name], value) for name, value in expected.items())
    return "same weights" if equal else "FAILS: other weights"


def without_room(folder: Path) -> str:
    return mounted(folder, "64k") + f"head -c 65536 /dev/zero > {folder}/filler\n"


def mounted(folder: Path | str, size: str, options: str = "") -> str:
    return f"mount -t tmpfs -o size={size}{options} tmpfs {folder} || exit 77\n"


def small_shm(bench: Bench) -> Iterator[Row]:
    for size in ("64k", "64m"):
        for ranks in (1, 2):
            folder = bench.root / f"shm{size}{ranks}"
            script = mounted("/dev/shm", size) + bench.train(ranks, SMALL_REAL_SIZE, folder)  # noqa: S108
            what = f"shared memory of {size}, {ranks} ranks, 4 workers, batch 16, 800x1333"
            yield bench.run(what, script, "large")


def few_files(bench: Bench) -> Iterator[Row]:
    for limit, ranks, workers in FILES:
        train = bench.train(
            ranks, WITH_FILES.format(workers), bench.root / f"{limit}{ranks}{workers}"
        )
        what = f"ulimit -n {limit}, {ranks} ranks, {workers} workers"
        yield bench.run(what, f"ulimit -n {limit}; {train}")


def read_only(bench: Bench) -> Iterator[Row]:
    locked = mounted(bench.disk, "1m", ",ro")
    settings = WITH_FILES.format(0)
    yield bench.run("read-only OUTPUT_DIR", locked + bench.train(1, settings, bench.disk))
    for ranks in (1, 2):
        for kind, prepare in (("read-only", locked), ("full", without_room(bench.disk))):
            train = bench.train(ranks, settings, bench.root / f"tmp-{kind}{ranks}")
            script = f"{prepare}export TMPDIR={bench.disk} HOME={bench.disk}; {train}"
            yield bench.run(f"{kind} TMPDIR and home, {ranks} ranks", script)


def commands(bench: Bench) -> Iterator[Row]:
    disk, recipe, images = bench.disk, bench.recipe, bench.root / "data/coco/val2017"
    run = bench.root / "run"
    bench.run("a run", bench.train(1, WITH_FILES.format(0), run))
    full = without_room(disk) + f"cd {disk}\n"
    typed = {
        "plan -o": f"plan {recipe} -o {disk}/plan.json",
        "memory -o": f"memory {recipe} -o {disk}/memory.json",
        "report -o": f"report {run} -o {disk}/report.html",
        "visualize": f"visualize {run} --input {images} --output {disk}/pictures",
        "demo": "demo",
    }
    python = f"{shlex.quote(sys.executable)} -m d2scale"
    for name, words in typed.items():
        yield bench.run(f"disk full under d2scale {name}", f"{full}{python} {words}")


BENCHMARKS = {
    "disk": full_disk,
    "shm": small_shm,
    "files": few_files,
    "read-only": read_only,
    "commands": commands,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS))
    wanted = parser.parse_args().only or tuple(BENCHMARKS)
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:  # noqa: S607
        sys.exit("needs the right to mount file systems of its own: root, or unshare allowed")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="d2scale-") as name:
        bench = Bench(Path(name))
        for kind in wanted:
            for row in BENCHMARKS[kind](bench):
                row["ended"] = row["ended"].replace(name, "...")
                # Each at once: the whole takes long, and may be stopped.
                kept = keep("shortage", [row], "what")
                print(row["what"], row["ended"], sep=": ", flush=True)
    print(table_of(kept))


if __name__ == "__main__":
    main()
