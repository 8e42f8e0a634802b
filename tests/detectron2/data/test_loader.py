"""One loader to a process: detectron2's own batches, whatever the processes and workers."""

import logging
import os
import signal
import subprocess
import sys
import time
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from d2scale.errors import CheckpointError, ConfigError, DataError
from d2scale.planning.rules import own_virtual_ranks
from virtual_rank_loaders import (
    IMAGES,
    entries,
    numbers,
    plain_mapper,
    process,
    random_mapper,
    refusing_all,
    refusing_mapper,
    same,
)

VIRTUAL_RANKS, EACH = 4, 3
TOTAL = VIRTUAL_RANKS * EACH
STEPS = 12  # several epochs of 37 images


def training_sampler():
    from detectron2.data.samplers import TrainingSampler

    return TrainingSampler(IMAGES, seed=5)


def repeat_factor_sampler():
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    return RepeatFactorTrainingSampler(torch.linspace(0.5, 2.5, IMAGES), seed=5)


def random_subset_sampler():
    from detectron2.data.samplers import RandomSubsetTrainingSampler

    return RandomSubsetTrainingSampler(IMAGES, 0.7, seed_shuffle=5, seed_subset=6)


SAMPLERS = [training_sampler, repeat_factor_sampler, random_subset_sampler]


def build(mapper=plain_mapper, sampler=training_sampler, total=TOTAL, **options):
    """What a recipe builds in this process."""
    from detectron2.data import build_detection_train_loader

    return build_detection_train_loader(
        entries(), mapper=mapper, sampler=sampler(), total_batch_size=total, **options
    )


def ours(rank=0, world_size=1, layout=(VIRTUAL_RANKS, EACH), **options):
    """The loader of one of ``world_size`` processes."""
    from d2scale.detectron2.data.loader import train_loader

    virtual_ranks, images = layout
    own = own_virtual_ranks(virtual_ranks, rank, world_size)
    with process(rank, world_size):
        return train_loader(build(total=world_size, **options), own, virtual_ranks, images)


def steps_of(world_size, steps=STEPS, **options):
    """Steps on ``world_size`` processes: their samples in the order of the ranks."""
    loaders = [ours(rank, world_size, **options) for rank in range(world_size)]
    return [list(chain(*(next(loader) for loader in loaders))) for _ in range(steps)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("collate", [None, list])
def test_every_virtual_rank_gets_the_batches_of_a_process_of_the_cluster(sampler, grouped, collate):
    options = {"sampler": sampler, "aspect_ratio_grouping": grouped, "collate_fn": collate}
    cluster = []
    for rank in range(VIRTUAL_RANKS):
        with process(rank, VIRTUAL_RANKS):
            batches = list(islice(build(**options), STEPS))
        cluster.append([numbers(batch) for batch in batches])
    expected = [list(chain(*step)) for step in zip(*cluster, strict=True)]
    for world_size in (1, 2, 3):
        assert [numbers(step) for step in steps_of(world_size, **options)] == expected


def test_samples_depend_on_neither_processes_nor_workers():
    torch.manual_seed(3)
    alone = steps_of(1, mapper=random_mapper)
    state = torch.get_rng_state()
    again = steps_of(3, mapper=random_mapper)
    torch.rand(1)
    by_workers = steps_of(2, mapper=random_mapper, num_workers=2)
    for step, other, third in zip(alone, again, by_workers, strict=True):
        assert same(step, other)
        assert same(step, third)
    drawn = [sample["numpy"] for step in alone for sample in step]
    assert len(set(drawn)) == len(drawn)
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


def test_an_image_that_the_mapper_refuses_is_replaced_by_the_same_other_one():
    alone = steps_of(1, mapper=refusing_mapper)
    for step, other in zip(alone, steps_of(2, mapper=refusing_mapper, num_workers=1), strict=True):
        assert same(step, other)
    for step in alone:
        assert all(number % 3 for number in numbers(step))
        for start in range(0, TOTAL, EACH):
            batch = step[start : start + EACH]
            assert len({sample["width"] > sample["height"] for sample in batch}) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mapper_that_refuses_all_images_is_an_error_in_one_line(workers):
    with pytest.raises(DataError, match="the mapper's sample is None; allowed: one for some image"):
        next(ours(mapper=refusing_all, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 5])
def test_resume_on_another_number_of_processes(workers, stop):
    whole = steps_of(1, mapper=random_mapper)
    loader = ours(0, 3, mapper=random_mapper, num_workers=workers)
    for _ in range(stop):
        next(loader)
    state = loader.state_dict()
    loader.close()
    for rank in range(2):
        resumed = ours(rank, 2, mapper=random_mapper)
        resumed.load_state_dict(state)
        for step in whole[stop:]:
            assert same(next(resumed), step[6 * rank : 6 * rank + 6])
        assert resumed.state_dict()["steps"] == [[STEPS, VIRTUAL_RANKS, EACH]]
    by_count = ours(mapper=random_mapper)
    by_count.begin_after_steps(stop)
    assert same(next(by_count), whole[stop])


def test_a_closed_loader_goes_on():
    whole = steps_of(1, mapper=random_mapper)
    loader = ours(mapper=random_mapper)
    for step in whole:
        loader.close()
        assert same(next(loader), step)


@pytest.mark.parametrize("grouped", [True, False])
def test_resume_after_another_layout_doubles_and_loses_no_image(grouped):
    options = {"aspect_ratio_grouping": grouped}
    seen, state = [], None
    for layout, steps in (((4, 3), 3), ((2, 4), 2), ((1, 1), IMAGES)):
        loader = ours(layout=layout, **options)
        if state is not None:
            loader.load_state_dict(state)
        seen += numbers(chain(*(next(loader) for _ in range(steps))))
        state = loader.state_dict()
    assert state["steps"] == [[3, 4, 3], [2, 2, 4], [IMAGES, 1, 1]]
    stream = training_sampler()._infinite_indices()
    assert sorted(seen) == sorted(islice(stream, len(seen)))


def test_a_training_of_which_only_the_images_are_known_goes_on_behind_them():
    loader = ours(aspect_ratio_grouping=False)
    loader.begin_after_images(10)
    images = numbers(chain(*(next(loader) for _ in range(2))))
    stream = list(islice(training_sampler()._infinite_indices(), 10 + 2 * TOTAL))
    assert sorted(images) == sorted(stream[10:])


def test_a_seed_that_detectron2_drew_is_kept():
    def drawing_sampler():
        from detectron2.data.samplers import RandomSubsetTrainingSampler

        return RandomSubsetTrainingSampler(IMAGES, 0.5)

    loader = ours(sampler=drawing_sampler)
    next(loader)
    state = loader.state_dict()
    resumed = ours(sampler=drawing_sampler)
    resumed.load_state_dict(state)
    assert numbers(next(resumed)) == numbers(next(loader))


def test_a_state_of_another_dataset_is_refused():
    state = ours().state_dict()
    with pytest.raises(CheckpointError, match=f"is 3; allowed: {IMAGES}, the images of"):
        ours().load_state_dict({**state, "images": 3})


@pytest.mark.parametrize("frozen", [True, False])
def test_a_config_whose_batch_detectron2_can_share_out(frozen):
    from detectron2.config import get_cfg

    from d2scale.detectron2.data.loader import with_even_batch

    cfg = get_cfg()
    if frozen:
        cfg.freeze()
    found = with_even_batch(cfg, 3)
    assert (cfg.SOLVER.IMS_PER_BATCH, found.SOLVER.IMS_PER_BATCH) == (16, 18)
    assert found.is_frozen() == frozen


def foreign_loaders():
    from detectron2.data import build_batch_data_loader
    from detectron2.data.common import MapDataset, ToIterableDataset
    from torch.utils.data import DataLoader, RandomSampler

    data = MapDataset(entries(), plain_mapper)
    iterable = ToIterableDataset(data, training_sampler())
    mapped = MapDataset(iterable, plain_mapper)
    finite = RandomSampler(range(IMAGES))
    without_sizes = MapDataset([{"image_id": 0}] * IMAGES, plain_mapper)
    grouped = {"total_batch_size": 2, "aspect_ratio_grouping": True}
    return {
        "it is a list": [[{"image_id": n} for n in pair] for pair in ((1, 2), (3, 4), (5, 6))],
        "its dataset is iterable": build_batch_data_loader(mapped, None, 2),
        "its RandomSampler has no stream": DataLoader(
            data, batch_size=2, sampler=finite, collate_fn=list
        ),
        "have no width and height": build_batch_data_loader(
            without_sizes, training_sampler(), **grouped
        ),
        "what was mapped before": build_batch_data_loader(entries(), training_sampler(), **grouped),
    }


@pytest.mark.parametrize(
    "reason",
    [
        "it is a list",
        "its dataset is iterable",
        "its RandomSampler has no stream",
        "have no width and height",
        "what was mapped before",
    ],
)
def test_a_foreign_loader_is_cut_in_its_own_order_with_one_warning(reason, caplog):
    from d2scale.detectron2.data.loader import train_loader

    with caplog.at_level(logging.WARNING, logger="d2scale"):
        loader = train_loader(foreign_loaders()[reason], range(2), 4, 2)
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "depend on the number of processes" in record.getMessage()
    if "width" not in reason:  # without it detectron2 cannot batch by aspect ratio either
        assert len(next(loader)) == 4
    loader.load_state_dict(loader.state_dict())
    loader.close()


def test_a_finite_foreign_loader_ends():
    from d2scale.detectron2.data.loader import train_loader

    loader = train_loader([[1, 2, 3], [4, 5, 6]], range(2), 4, 2)
    assert list(loader) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_batch_that_is_no_list_of_samples_is_an_error_in_one_line(foreign):
    from d2scale.detectron2.data.loader import train_loader

    loader = ours(collate_fn=lambda samples: {"images": samples})
    if foreign:
        loader = train_loader([{"images": []}], range(2), 4, 2)
    with pytest.raises(ConfigError, match="a batch of the training loader is 'dict'"):
        next(loader)


RANK = """\
import os, signal, sys
sys.path.insert(0, {folder!r})
import test_loader
if __name__ == "__main__":
    loader = test_loader.ours(num_workers=2, mapper=test_loader.slow_mapper)
    loader._batches = loader._start_workers()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def slow_mapper(entry):
    time.sleep(400)


def test_workers_end_with_a_rank_that_is_killed_as_it_starts_them(tmp_path):
    (tmp_path / "rank.py").write_text(RANK.format(folder=str(Path(__file__).parent)))
    path = os.pathsep.join([*sys.path])
    # The workers hold the pipe open for as long as they live.
    done = subprocess.run(
        [sys.executable, tmp_path / "rank.py"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL
