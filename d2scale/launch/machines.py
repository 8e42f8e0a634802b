"""Meet the other machines of a run, say who is missing, and notice when one is gone."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from d2scale.errors import ConfigError, D2ScaleError, Fault
from d2scale.launch.comparison import SAME_EVERYWHERE, versions
from d2scale.launch.network import (
    own_address,
    reason_against,
    reason_against_serving,
    use_route_to,
)
from d2scale.launch.topology import Topology, address_of, url_fault

logger = logging.getLogger(__name__)

_TOLD_AFTER_SECONDS, _TOLD_AGAIN_AFTER_SECONDS = 3.0, 30.0
_POLL_SECONDS = 0.2
# Somebody answers there, or this machine is to: it cannot take longer.
_CONNECT_SECONDS = 30.0
_BEAT_SECONDS = 1.0
# A machine is given up when it was not heard for so long; sooner if connections to it broke.
SILENT_AFTER_SECONDS = 30.0
SILENT_AFTER_ERROR_SECONDS = 10.0
# Machine 0 holds the store, in which the others still have to read how it ends.
_LINGER_SECONDS = 3 * _BEAT_SECONDS
# A mistake that ends one machine ends the others too, in their own words, which say more.
_OWN_END_SECONDS = 5.0
_DONE, _ENDED = "done", "ended: "


@contextmanager
def machines_met(topology: Topology, device: str) -> Iterator[Watch | None]:
    """Within the context, all machines of the run are there; None for a single one.

    Says whom it waits for, and lets gloo and NCCL use the interface of the route between machines.

    Raises:
        ConfigError: for a URL that cannot be used, and if the machines were given different
            numbers of machines or ranks, or have different devices (cpu or cuda) or packages.
        D2ScaleError: if a machine does not come within ``topology.join_timeout``.
    """
    if topology.num_machines == 1:
        yield None
        return
    facts = {
        **versions(),
        "--num-machines": topology.num_machines,
        "--num-gpus": topology.num_processes,
        "MODEL.DEVICE": device,
    }
    deadline = time.monotonic() + topology.join_timeout
    store = _open_store(topology, deadline)
    try:
        _refuse_differences(_exchange(store, topology, facts, deadline))
    except D2ScaleError:
        time.sleep(_LINGER_SECONDS)
        raise
    watch = Watch(store, topology)
    try:
        yield watch
    except BaseException as error:
        watch.leave(_ENDED + (f"{error}".partition("\n")[0].rstrip(":") or "interrupted"))
        raise
    watch.leave()


def _open_store(topology: Topology, deadline: float) -> dist.Store:
    """Return the store that machine 0 serves at the URL."""
    address = address_of(topology.dist_url)
    assert address is not None
    is_first = topology.machine_rank == 0
    if not is_first:
        _wait(topology, 0, deadline, lambda: reason_against(address))
    elif reason := reason_against_serving(address):
        raise ConfigError([url_fault(topology.dist_url, reason)])
    try:
        timeout = timedelta(seconds=min(_CONNECT_SECONDS, topology.join_timeout))
        store = dist.TCPStore(*address, is_master=is_first, timeout=timeout, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=topology.join_timeout))
        return store
    except RuntimeError as error:  # newer versions of torch raise a DistNetworkError
        reason = str(error).partition("\n")[0]
        raise ConfigError([url_fault(topology.dist_url, reason)]) from error


def _wait(
    topology: Topology, number: int, deadline: float, obstacle: Callable[[], str | None]
) -> None:
    """Wait for machine ``number`` until ``obstacle`` is None, and say so now and then.

    Raises D2ScaleError after the deadline, a value of ``time.monotonic()``.
    """
    waited = f"machine {number} of {topology.num_machines} at {topology.dist_url}"
    tell_at = time.monotonic() + _TOLD_AFTER_SECONDS
    while (reason := obstacle()) is not None:
        if time.monotonic() > deadline:
            raise D2ScaleError(
                f"waited {topology.join_timeout:g} s for {waited} ({reason}); start the same "
                f"command there with --machine-rank {number}, or wait longer with --join-timeout"
            )
        if time.monotonic() > tell_at:
            logger.warning("waiting for %s (%s)", waited, reason)
            tell_at = time.monotonic() + _TOLD_AGAIN_AFTER_SECONDS
        time.sleep(_POLL_SECONDS)


def _exchange(
    store: dist.Store, topology: Topology, facts: Mapping[str, Any], deadline: float
) -> list[dict[str, Any]]:
    """Return the facts of all machines, by number; let gloo and NCCL use the route between them."""
    host, _ = address_of(topology.dist_url) or ("", 0)
    own = {"facts": facts, "address": own_address(host)}
    store.set(f"machine{topology.machine_rank}", json.dumps(own))
    machines = []
    for number in range(topology.num_machines):
        key = f"machine{number}"
        _wait(topology, number, deadline, partial(_missing, store, key))
        machines.append(json.loads(store.get(key)))
    # Machine 0 may know itself by a loopback address only: then by the way to the others.
    use_route_to([host, *(machine["address"] for machine in machines if machine["address"])])
    return [machine["facts"] for machine in machines]


def _missing(store: dist.Store, key: str) -> str | None:
    return None if store.check([key]) else "not there"


def _refuse_differences(machines: list[dict[str, Any]]) -> None:
    """Compare what makes up the group: with differences, its ranks would wait for each other."""
    first, *others = machines
    for number, other in enumerate(others, start=1):
        for key, value in first.items():
            if other.get(key) != value:
                name, allowed = f"{key} on machine {number}", f"{value!r}, as on machine 0"
                raise ConfigError([Fault(name, other.get(key), allowed, SAME_EVERYWHERE)])


class Watch:
    """Tells the other machines every second that this one is there, and hears the same of them.

    Args:
        store: one that all machines reach, served by machine 0.
        topology: of the run.
    """

    def __init__(self, store: dist.Store, topology: Topology) -> None:
        self._store = store
        self._topology = topology
        numbers = set(range(topology.num_machines)) - {topology.machine_rank}
        self._heard = dict.fromkeys(sorted(numbers), time.monotonic())
        self._words: dict[int, str] = {}
        self._last_word = ""
        self._leaving = threading.Event()
        # A thread of its own, for a store that cannot be reached keeps one waiting for minutes.
        self._thread = threading.Thread(target=self._tell_and_hear, daemon=True)
        self._thread.start()

    def _tell_and_hear(self) -> None:
        own_key = f"alive{self._topology.machine_rank}"
        beats = 0
        with suppress(RuntimeError):  # the store has gone with machine 0
            while not self._leaving.wait(_BEAT_SECONDS):
                beats += 1
                self._store.set(own_key, str(beats))
                for number in self._heard:
                    self._hear(number)
            self._store.set(own_key, self._last_word)

    def _hear(self, number: int) -> None:
        key = f"alive{number}"
        if not self._store.check([key]):
            return
        word = self._store.get(key).decode()
        if word != self._words.get(number):
            self._words[number], self._heard[number] = word, time.monotonic()

    def loss(self, silent_after: float | None = None) -> D2ScaleError | None:
        """Return which other machine has failed or fallen silent; None while all are well."""
        silent_after = silent_after or SILENT_AFTER_SECONDS
        if self._words.get(0) == _DONE:
            return None  # the store has ended with it
        # In order, for without machine 0 nobody is heard.
        for number, heard in self._heard.items():
            name = f"machine {number} of {self._topology.num_machines}"
            word = self._words.get(number, "")
            if word.startswith(_ENDED) and time.monotonic() - heard > _OWN_END_SECONDS:
                return D2ScaleError(f"{name} has {word}")
            if word != _DONE and time.monotonic() - heard > silent_after:
                return D2ScaleError(
                    f"{name} has not been heard of for {silent_after:g} s: it has ended, or the "
                    "network to it is down; --resume goes on from the last checkpoint"
                )
        return None

    def loss_behind_an_error(self) -> D2ScaleError | None:
        """Wait some seconds for the machine whose loss has broken a connection."""
        until = time.monotonic() + SILENT_AFTER_ERROR_SECONDS + _LINGER_SECONDS
        while time.monotonic() < until:
            if loss := self.loss(SILENT_AFTER_ERROR_SECONDS):
                return loss
            time.sleep(_POLL_SECONDS)
        return None

    def leave(self, last_word: str = _DONE) -> None:
        """Tell the other machines how this one ends."""
        self._last_word = last_word
        self._leaving.set()
        self._thread.join(timeout=_LINGER_SECONDS)
        if self._topology.machine_rank == 0:
            time.sleep(_LINGER_SECONDS)
