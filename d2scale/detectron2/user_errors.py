"""A user's mistake ends in one line a fault and exit status 2, on any number of ranks.

detectron2 and d2go do not distinguish a user's mistake from a bug: what a trainer or a runner
raises is printed as a traceback.
"""

from __future__ import annotations

import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from torch.multiprocessing import ProcessExitedException

from d2scale.errors import EXIT_STATUS_USER_ERROR, ConfigError, D2ScaleError, Fault
from d2scale.launch.workers import telling_of_lost_workers
from d2scale.run_folder.shortages import telling_of_shortages
from d2scale.step import ranks
from d2scale.step.out_of_memory import is_out_of_memory

if TYPE_CHECKING:  # d2go is started by what tells that it is not installed
    from detectron2.engine import TrainerBase

_LATER_SECONDS = 5.0
_PACKAGE = Path(__file__).parents[1]


@contextmanager
def exit_on_user_error(*folders: Path) -> Iterator[None]:
    """Within the context, a D2ScaleError is printed and ends this process.

    So does the loss of a loader worker, and whatever has run out, such as the disk of ``folders``,
    which are written to.
    """
    try:
        with telling_of_shortages(*folders), telling_of_lost_workers():
            yield
    except D2ScaleError as error:
        _exit_for(error)


@contextmanager
def exit_alone_on_user_error(*folders: Path) -> Iterator[None]:
    """As :func:`exit_on_user_error`, for an error that only some ranks may meet."""
    try:
        with telling_of_shortages(*folders), telling_of_lost_workers():
            yield
    except D2ScaleError as error:
        # Others may have the same to tell. They are ended when rank 0 has ended.
        time.sleep(_LATER_SECONDS * (ranks.rank() > 0))
        _exit_for(error)


def let_hooks_exit_on_user_error(trainer: TrainerBase, folder: Path) -> None:
    """Tell in one line of a full disk that a hook of ``trainer`` meets; it writes to ``folder``.

    detectron2 prints the traceback of an exception of a hook, and then calls what ends a training.
    """
    own = weakref.proxy(trainer)  # a trainer in a reference cycle keeps its workers alive
    ends = False

    def shielded(method: Callable[[Any], None]) -> Callable[[], None]:
        def call() -> None:
            nonlocal ends
            if ends:
                return
            try:
                with exit_alone_on_user_error(folder):
                    method(own)
            except SystemExit:
                ends = True
                raise

        return call

    for name in ("before_train", "after_step", "after_train"):
        setattr(trainer, name, shielded(getattr(type(trainer), name)))


@contextmanager
def exit_together_on_user_error() -> Iterator[None]:
    """Within the context, a D2ScaleError of any rank ends all ranks; rank 0 prints it.

    Every rank must enter and leave the context.
    """
    raised: D2ScaleError | None = None
    try:
        yield
    except D2ScaleError as error:
        raised = error
    messages = ranks.gather_objects(str(raised or ""))
    if not any(messages):
        return
    if ranks.rank() == 0:
        _print_faults("\n".join(messages))
    # The launcher ends all ranks as soon as one has ended: not before rank 0 has printed.
    ranks.gather_objects(None)
    raise SystemExit(EXIT_STATUS_USER_ERROR) from raised


@contextmanager
def faults_of_building(key: str, value: str) -> Iterator[None]:
    """Within the context, whatever is raised becomes one line with the place that raised it.

    detectron2, and what it is extended with, judge values while they build of them: what is raised
    there is most often a mistake in the recipe, and may be of any kind. A lack of memory, and what
    d2scale itself raises, passes as it is.
    """
    try:
        with telling_of_shortages():
            yield
    except D2ScaleError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if is_out_of_memory(error) or _PACKAGE in Path(place.filename).parents:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = f"correct its values ({reason}, in {place.filename}:{place.lineno})"
        raise ConfigError([Fault(key, value, "what can be built", advice)]) from error


def end_with_status_of_ranks() -> None:
    """Let the process that launched the ranks end as they do after a user's mistake.

    torch raises an error there that says nothing but their exit status.
    """
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ProcessExitedException) and error.exit_code == EXIT_STATUS_USER_ERROR:
            raise SystemExit(EXIT_STATUS_USER_ERROR)
        previous(kind, error, traceback)

    sys.excepthook = excepthook


def _exit_for(error: D2ScaleError) -> NoReturn:
    _print_faults(str(error))
    raise SystemExit(EXIT_STATUS_USER_ERROR) from error


def _print_faults(message: str) -> None:
    for line in dict.fromkeys(filter(None, message.splitlines())):
        # Not print(): d2go turns that into a log line.
        sys.stderr.write(f"d2scale: error: {line}\n")
