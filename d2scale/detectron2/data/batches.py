"""Which images each virtual rank gets in each step: those of a process of the recipe's cluster.

detectron2's samplers are one endless stream of image numbers, of which process v of N0 takes the
elements v, v + N0, v + 2 * N0, ... and batches them, by aspect ratio if asked to, as they come.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

Element = tuple[int, int]  # place in the stream, number of the image in the dataset


class StepsTaken(NamedTuple):
    """Steps that a training took with one layout of its batch."""

    steps: int
    virtual_ranks: int
    ims_per_virtual_rank: int


class VirtualRankBatches(Iterator[list[list[int]]]):
    """An endless stream of steps, each the numbers of the images of every virtual rank.

    Args:
        stream: the numbers that all virtual ranks share.
        virtual_ranks: how many there are, N0.
        ims_per_virtual_rank: images of each in a step.
        group_of: the group of an image; the images of one batch are of one group.
    """

    def __init__(
        self,
        stream: Iterator[int],
        virtual_ranks: int,
        ims_per_virtual_rank: int,
        group_of: Callable[[int], int],
    ) -> None:
        self.layout = (virtual_ranks, ims_per_virtual_rank)
        self._stream = enumerate(stream)
        self._group_of = group_of
        self._dealt: list[deque[Element]] = [deque() for _ in range(virtual_ranks)]
        # By virtual rank and group.
        self._waiting: list[dict[int, list[Element]]] = [
            defaultdict(list) for _ in range(virtual_ranks)
        ]

    def __next__(self) -> list[list[int]]:
        return [self._batch(virtual_rank) for virtual_rank in range(len(self._dealt))]

    def rest(self) -> Iterator[int]:
        """Return what was not shown yet, in the order of the stream, which is then used up here."""
        waiting = chain.from_iterable(chain(*groups.values()) for groups in self._waiting)
        drawn = sorted(chain(waiting, *self._dealt))
        return (image for _, image in chain(drawn, self._stream))

    def _batch(self, virtual_rank: int) -> list[int]:
        while True:
            element = self._deal_to(virtual_rank)
            group = self._waiting[virtual_rank][self._group_of(element[1])]
            group.append(element)
            if len(group) == self.layout[1]:
                images = [image for _, image in group]
                group.clear()
                return images

    def _deal_to(self, virtual_rank: int) -> Element:
        # Groups fill at another pace on each virtual rank, so some are ahead of others.
        if not self._dealt[virtual_rank]:
            for own in self._dealt:
                own.append(next(self._stream))
        return self._dealt[virtual_rank].popleft()


def batches_after(
    history: Iterable[StepsTaken],
    stream: Iterator[int],
    virtual_ranks: int,
    ims_per_virtual_rank: int,
    group_of: Callable[[int], int],
) -> VirtualRankBatches:
    """Return the batches that follow those of ``history``, which are drawn again.

    No image is shown twice or left out: where the layout changes, what was drawn and not shown
    comes first.
    """
    now = StepsTaken(0, virtual_ranks, ims_per_virtual_rank)
    batches: VirtualRankBatches | None = None
    for taken in [*history, now]:
        if batches is None or batches.layout != taken[1:]:
            rest = stream if batches is None else batches.rest()
            batches = VirtualRankBatches(rest, *taken[1:], group_of)
        for _ in range(taken.steps):
            next(batches)
    assert batches is not None
    return batches


class AspectRatioGroups:
    """Tells the group of an image as detectron2 has two: wider than high, or not.

    Args:
        entries: of the dataset, with "width" and "height". Each is read once.
    """

    def __init__(self, entries: Any) -> None:
        self._entries = entries
        self._known = bytearray(len(entries))  # 0: not read yet; else one more than the group

    def __call__(self, image: int) -> int:
        if not self._known[image]:
            entry = self._entries[image]
            self._known[image] = 1 if entry["width"] > entry["height"] else 2
        return self._known[image] - 1


def one_group(image: int) -> int:
    """Tell that all images are of one group."""
    return 0
