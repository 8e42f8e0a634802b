"""The images of each virtual rank, without detectron2."""

from itertools import chain, count, islice

from d2scale.detectron2.data.batches import (
    AspectRatioGroups,
    StepsTaken,
    VirtualRankBatches,
    batches_after,
    one_group,
)


def odd(image):
    return image % 3 % 2


def take(batches, steps):
    return list(islice(batches, steps))


def shown(steps):
    return list(chain.from_iterable(chain.from_iterable(steps)))


def test_virtual_rank_v_takes_every_n0_th_image_from_the_v_th():
    first, second = take(VirtualRankBatches(count(), 2, 3, one_group), 2)
    assert first == [[0, 2, 4], [1, 3, 5]]
    assert second == [[6, 8, 10], [7, 9, 11]]


def test_a_batch_is_of_one_group():
    for step in take(VirtualRankBatches(count(), 3, 4, odd), 20):
        for virtual_rank, images in enumerate(step):
            assert len({odd(image) for image in images}) == 1
            assert {image % 3 for image in images} == {virtual_rank}


def test_batches_go_on_after_the_steps_taken():
    whole = take(VirtualRankBatches(count(), 3, 4, odd), 12)
    rest = batches_after([StepsTaken(7, 3, 4)], count(), 3, 4, odd)
    assert take(rest, 5) == whole[7:]
    rest = batches_after([StepsTaken(3, 3, 4), StepsTaken(4, 3, 4)], count(), 3, 4, odd)
    assert take(rest, 5) == whole[7:]


def test_another_layout_doubles_and_loses_no_image():
    before = take(VirtualRankBatches(count(), 3, 4, odd), 5)
    history = [StepsTaken(5, 3, 4)]
    between = take(batches_after(history, count(), 2, 5, odd), 3)
    history.append(StepsTaken(3, 2, 5))
    after = take(batches_after(history, count(), 1, 1, one_group), 200)
    images = shown(before + between + after)
    assert len(set(images)) == len(images)
    # One image at a time shows all that was left over at once, and then the stream in order.
    assert sorted(images) == list(range(len(images)))


def test_a_group_is_read_once():
    reads = []

    class Entries(list):
        def __getitem__(self, image):
            reads.append(image)
            return super().__getitem__(image)

    sizes = [(2, 1), (1, 2), (1, 1)]
    group_of = AspectRatioGroups(Entries([{"width": w, "height": h} for w, h in sizes]))
    assert [group_of(image) for image in (0, 1, 2, 1, 0)] == [0, 1, 1, 1, 0]
    assert reads == [0, 1, 2]
