"""What a training step allocates and frees, in order, for any number of images.

Two recorded steps, with one and with two images, become one :class:`Stream`: the size of each
request is a line in the number of images. Numbers in, numbers out; no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from d2scale.memory.alignment import corresponding

# Operation and phase of what a library takes while one of its operations runs: no tensor holds it.
WORKSPACE = "workspace"


@dataclass(eq=False, frozen=True)
class Allocation:
    """One storage."""

    operation: str  # name of the operation that allocated it
    # The shape of its first tensor without the leading dimension, which is the one that the
    # images count in.
    trailing_shape: tuple[int, ...]
    phase: str  # part of the step
    nbytes: int  # its size

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for the same allocation of steps with different numbers of images."""
        return (self.operation, self.trailing_shape, self.phase)


class Event(NamedTuple):
    """An allocation, or when it is freed."""

    allocation: Allocation
    is_free: bool


@dataclass(eq=False)
class Trace:
    """A recorded step."""

    held: list[Allocation]  # allocations from before it
    events: list[Event] = field(default_factory=list)  # in order

    def allocate(self, allocation: Allocation) -> None:
        """Record an allocation."""
        self.events.append(Event(allocation, False))

    def free(self, allocation: Allocation) -> None:
        """Record that one is freed."""
        self.events.append(Event(allocation, True))

    def allocations(self) -> list[Allocation]:
        """Return what the step allocates, in order."""
        return [event.allocation for event in self.events if not event.is_free]


class Line(NamedTuple):
    """Bytes as a function of the images: ``static_bytes + images * bytes_per_image``."""

    static_bytes: int
    bytes_per_image: int

    def at(self, images: float) -> float:
        """Return the bytes for ``images``, which need not be whole."""
        return self.static_bytes + images * self.bytes_per_image


@dataclass(frozen=True)
class Stream:
    """A training step for any number of images."""

    # Bytes of each storage that outlives the step: weights, buffers, optimizer state.
    held: tuple[int, ...]
    requests: tuple[Line, ...]  # a line for each allocation of the step
    phases: tuple[str, ...]  # the part of the step that each request belongs to
    # Position in ``requests``, and whether it is freed there, in order.
    events: tuple[tuple[int, bool], ...]

    @classmethod
    def from_traces(cls, one: Trace, two: Trace) -> Stream:
        """Combine steps with one and with two images."""
        ones, twos = one.allocations(), two.allocations()
        partner = _partners(ones, twos)
        position = {id(allocation): index for index, allocation in enumerate(twos)}
        events = [
            (position[id(event.allocation)], event.is_free)
            for event in two.events
            if id(event.allocation) in position
        ]
        passing = _freed_within_their_round(events, partner)
        requests = []
        for index, allocation in enumerate(twos):
            nbytes = allocation.nbytes
            if index in partner:
                before = ones[partner[index]].nbytes
            else:
                # Allocated by a loop over the images, in the round of its first one. Either it is
                # freed in its round, or it stays, and stands for those of all images but one.
                before = nbytes if index in passing else 0
            requests.append(Line(2 * before - nbytes, nbytes - before))
        return cls(
            held=tuple(allocation.nbytes for allocation in two.held),
            requests=tuple(requests),
            phases=tuple(allocation.phase for allocation in twos),
            events=tuple(events),
        )

    def request_bytes(self, images: float) -> list[int]:
        """Return the size of every request of a step with ``images`` images of the traced size.

        Fewer than a whole image, or a fraction, stands for smaller images.
        """
        return [max(0, round(line.at(images))) for line in self.requests]

    def peak_lines(self) -> dict[str, list[Line]]:
        """Return, for each phase, the lines whose maximum is the peak of its tensors' bytes."""
        lines: dict[str, set[Line]] = {}
        static, slope = sum(self.held), 0
        for index, is_free in self.events:
            if self.phases[index] == WORKSPACE:
                continue
            sign = -1 if is_free else 1
            static += sign * self.requests[index].static_bytes
            slope += sign * self.requests[index].bytes_per_image
            if not is_free:
                lines.setdefault(self.phases[index], set()).add(Line(static, slope))
        return {phase: upper_envelope(phase_lines) for phase, phase_lines in lines.items()}


def upper_envelope(lines: Iterable[Line]) -> list[Line]:
    """Return the lines that are the largest for some number of images from one up."""
    envelope: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.bytes_per_image, line.static_bytes)):
        while envelope and (
            envelope[-1].at(1) <= line.at(1)
            or (len(envelope) > 1 and _crossing(*envelope[-2:]) >= _crossing(envelope[-2], line))
        ):
            envelope.pop()
        envelope.append(line)
    return envelope


def _crossing(flat: Line, steep: Line) -> float:
    """Images from which ``steep`` is the larger."""
    return (flat.static_bytes - steep.static_bytes) / (steep.bytes_per_image - flat.bytes_per_image)


def _partners(ones: Sequence[Allocation], twos: Sequence[Allocation]) -> dict[int, int]:
    """Map positions in ``twos`` to those of the same allocations in ``ones``.

    Allocations without a partner may only have come in another order, as autograd may choose, or
    have another shape, where the images do not count in the leading dimension.
    """
    partners = corresponding([a.likeness for a in ones], [a.likeness for a in twos])
    single = defaultdict(list)
    for one in sorted(set(range(len(ones))) - set(partners.values())):
        single[ones[one].likeness].append(one)
    for two in reversed(range(len(twos))):
        if two not in partners and single[twos[two].likeness]:
            partners[two] = single[twos[two].likeness].pop()
    matched = set(partners.values())
    for left, right in list(_gaps(partners, len(ones), len(twos))):
        few, many = [i for i in left if i not in matched], [j for j in right if j not in partners]
        names = [ones[i].operation for i in few], [twos[j].operation for j in many]
        for two, one in corresponding(*names).items():
            partners[many[two]] = few[one]
    return partners


def _gaps(
    partners: Mapping[int, int], ones: int, twos: int
) -> Iterator[tuple[Iterable[int], Iterable[int]]]:
    """Yield the positions in both sequences between neighbouring pairs that keep their order."""
    one_start = two_start = 0
    for two, one in [*sorted(partners.items()), (twos, ones)]:
        if one >= one_start:
            yield range(one_start, one), range(two_start, two)
            one_start, two_start = one + 1, two + 1


def _freed_within_their_round(
    events: Sequence[tuple[int, bool]], partner: Mapping[int, int]
) -> set[int]:
    """Positions without a partner that are freed before the next that has one is allocated."""
    freed: set[int] = set()
    since: set[int] = set()
    for index, is_free in events:
        if is_free:
            freed |= {index} & since
        elif index in partner:
            since.clear()
        else:
            since.add(index)
    return freed
