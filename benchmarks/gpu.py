"""Run what one GPU can prove, in slices of under ten minutes; go on where it stopped.

    python benchmarks/gpu.py [--minutes 9] [--only SLICE...] [--small-card GIB]
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --dry-run     # on a CPU, in seconds each; keeps nothing

Each row is kept, with its machine, in results/gpu_SLICE.json as soon as it is made; gpu.json says
how the slices ended. What is done on this GPU is not run again, unless it is named. A slice that
failed or was stopped comes again after those that have not run yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import machine
    from campaign.setting import REPOSITORY, Row, Setting, Slice
    from campaign.slices import SLICES
    from tabulate import tabulate

    from d2scale.errors import ConfigError, Fault
    from d2scale.run_folder.files import folder_faults
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed; see 'On a GPU' in benchmarks/README.md, or: make gpu")

LIMIT_MINUTES = 10.0
FOLDER = REPOSITORY / "output" / "gpu"
DONE = "done"


def run_here(chosen: Slice, card_gib: float | None) -> None:
    """Run a slice in this process; keep its rows and how it ends."""
    started = time.monotonic()
    name, rows = label(chosen.name, card_gib), 0
    _keep_status(name, "begun", 0, started)
    try:
        for row in chosen.run(Setting.on_gpu(_folder(), card_gib)):
            row = {**row, "key": label(row["key"], card_gib)}
            machine.keep(_results_name(chosen), [row], "key")
            rows += 1
            print(json.dumps(row), flush=True)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        _keep_status(name, f"failed: {type(error).__name__}: {first_line[:200]}", rows, started)
        raise
    _keep_status(name, DONE, rows, started)


def label(name: str, card_gib: float | None) -> str:
    """Return the name of what a slice keeps: other rows on a part of the card than on all of it."""
    return f"{name}, {card_gib:g} GiB" if card_gib else name


def dry_run(chosen: Slice) -> list[Row]:
    """Run a slice shrunk to seconds on this CPU, and return its rows; nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="d2scale-gpu-") as folder:
        return [*chosen.run(Setting.dry_run(Path(folder)))]


def run_all(chosen: Sequence[Slice], minutes: float | None, card_gib: float | None) -> int:
    """Run slices, each in a process of its own; return how many did not end well."""
    started, failed = time.monotonic(), 0
    for one in chosen:
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        if left is not None and one.minutes > left:
            print(f"{one.name}: not begun, for it takes {one.minutes:g} minutes")
            continue
        seconds = 60 * min(LIMIT_MINUTES, left or LIMIT_MINUTES)
        log = _folder() / f"{one.name}.log"
        print(f"{one.name}: {one.text} ({log})", flush=True)
        status = _in_process(one, card_gib, seconds, log)
        failed += status != 0
        if status == 0:
            ended = statuses()[label(one.name, card_gib)]
            print(f"  {ended['status']}, {ended['rows']} rows, {ended['seconds']} s", flush=True)
            continue
        # Killed or not even begun, it has not kept how it ended.
        end = f"stopped after {seconds:.0f} s" if status is None else f"failed, status {status}"
        lines = log.read_text(errors="replace").splitlines()[-12:]
        print("\n    ".join([f"  {end}; its last words:", *lines]), flush=True)
    return failed


def _in_process(one: Slice, card_gib: float | None, seconds: float, log: Path) -> int | None:
    """Return the exit status of a slice run as a process; None if it was ended after ``seconds``.

    All that it started ends with it.
    """
    command = [sys.executable, __file__, "--here", "--only", one.name]
    command += ["--small-card", str(card_gib)] if card_gib else []
    environment = {**os.environ, **dict(one.environment)}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: they have a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def statuses() -> dict[str, Row]:
    """Return how the slices ended, by their label."""
    return {row["slice"]: row for row in machine.kept("gpu", "slice")}


def open_slices(gpus: Any, card_gib: float | None = None) -> list[Slice]:
    """Return the slices that are not done on these GPUs; those that have begun before, last."""
    known = {name: row for name, row in statuses().items() if row["machine"]["gpus"] == gpus}
    ended = [known.get(label(one.name, card_gib), {}).get("status") for one in SLICES]
    waiting = [one for one, status in zip(SLICES, ended, strict=True) if status is None]
    broken = [one for one, status in zip(SLICES, ended, strict=True) if status not in (None, DONE)]
    return waiting + broken


def gpus_here() -> list[str]:
    """Return the GPUs of this machine; asked in another process, which leaves no context."""
    code = "import json, machine; print(json.dumps(machine.describe()['gpus']))"
    text = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    found: list[str] = json.loads(text.splitlines()[-1])
    return found


def table() -> str:
    """Return all slices, what they prove, and how they ended."""
    known = statuses()
    rows = []
    for one in SLICES:
        on_parts = [name for name in known if name.startswith(f"{one.name}, ")]
        for name in (one.name, *on_parts):
            ended = known.get(name, {})
            gpus = ended.get("machine", {}).get("gpus", [])
            rows.append(
                {
                    "slice": name,
                    "minutes": one.minutes,
                    "status": ended.get("status", "open"),
                    "rows": ended.get("rows"),
                    "GPU": ", ".join(gpus),
                    "what": one.text,
                }
            )
    return tabulate(rows, headers="keys", tablefmt="pipe")


def _keep_status(name: str, status: str, rows: int, started: float) -> None:
    seconds = round(time.monotonic() - started, 1)
    machine.keep(
        "gpu", [{"slice": name, "status": status, "rows": rows, "seconds": seconds}], "slice"
    )


def _results_name(one: Slice) -> str:
    return "gpu_" + one.name.replace("-", "_")


def _folder() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER


def unwritable() -> list[Fault]:
    """Return which folders of results and logs cannot be written: asked before hours of work."""
    folders = {"results": machine.RESULTS, "logs": FOLDER}
    return [fault for key, path in folders.items() for fault in folder_faults(path, key=key)]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="show the slices and how they ended")
    names = [one.name for one in SLICES]
    add("--only", nargs="+", choices=names, metavar="SLICE", help="these, done or not")
    add("--minutes", type=float, metavar="N", help="begin nothing that is expected not to end by N")
    add("--dry-run", action="store_true", help="shrink all to seconds on a CPU; nothing is kept")
    add("--small-card", type=float, metavar="GIB", help="take no more of the GPU than this")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run what the command line asks for; the status is 1 if a slice failed, 130 after Ctrl-C."""
    try:
        return _run(parse())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of a pipe has left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    chosen = [one for one in SLICES if not options.only or one.name in options.only]
    if options.list:
        print(table(), flush=True)
    elif options.dry_run:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        for one in chosen:
            started = time.monotonic()
            rows = dry_run(one)
            print(f"{one.name}: {len(rows)} rows, {time.monotonic() - started:.1f} s", flush=True)
    elif options.here:
        run_here(chosen[0], options.small_card)
    else:
        gpus = gpus_here()
        if not gpus:
            print("CUDA is not available here; --dry-run tries the code without", file=sys.stderr)
            return 2
        statuses()  # damaged, it is told before hours of work
        if faults := unwritable():
            print(*faults, sep="\n", file=sys.stderr)
            return 2
        # Ended by another program, it ends the slice as well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        chosen = chosen if options.only else open_slices(gpus, options.small_card)
        if not chosen:
            print("all slices are done on this GPU; --only runs some of them again")
        return 1 if run_all(chosen, options.minutes, options.small_card) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
