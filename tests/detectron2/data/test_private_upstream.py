"""The private parts of detectron2's datasets and samplers are still what they were.

Tried with detectron2 02b5c4e, on torch 2.5.1, 2.9.1 and 2.15.0.
"""

from itertools import islice

import torch


def test_datasets_name_what_they_map():
    from detectron2.data.common import MapDataset, ToIterableDataset
    from detectron2.data.samplers import TrainingSampler

    from d2scale.detectron2.data.private_upstream import unmapped

    data = [1, 2, 3]
    mapped = MapDataset(data, str)
    entries, mapper = unmapped(mapped)
    assert entries is data
    assert mapper(1) == "1"
    iterable = ToIterableDataset(data, TrainingSampler(3))
    assert unmapped(MapDataset(iterable, str))[0] is iterable
    assert unmapped(iterable) == (iterable, None)


def test_samplers_of_all_processes_share_one_stream():
    from detectron2.data.samplers import (
        RandomSubsetTrainingSampler,
        RepeatFactorTrainingSampler,
        TrainingSampler,
    )

    from d2scale.detectron2.data.private_upstream import (
        drawn_by,
        follows_shared_stream,
        seed_of,
        shared_stream,
        with_drawn,
    )

    for kind, *arguments in (
        (TrainingSampler, 9),
        (RandomSubsetTrainingSampler, 9, 0.5),
        (RepeatFactorTrainingSampler, torch.ones(9)),
    ):
        sampler = kind(*arguments)
        assert follows_shared_stream(sampler)
        assert seed_of(sampler) == sampler._seed
        other = with_drawn(kind(*arguments), drawn_by(sampler))
        expected = list(islice(shared_stream(sampler), 20))
        assert list(islice(shared_stream(other), 20)) == expected
        other._rank, other._world_size = 1, 3
        assert list(islice(other, 5)) == expected[1:15:3]


def test_a_sampler_with_an_order_of_its_own_is_told_apart():
    from detectron2.data.samplers import TrainingSampler

    from d2scale.detectron2.data.private_upstream import follows_shared_stream

    class Backwards(TrainingSampler):
        def __iter__(self):
            yield from reversed(range(self._size))

    assert not follows_shared_stream(Backwards(1000))
    assert not follows_shared_stream([1, 2, 3])
