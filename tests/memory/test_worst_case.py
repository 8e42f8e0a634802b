from d2scale.memory.worst_case import WorstCase, assumed_worst_case, largest_sizes

RESIZING = ((640, 800), 1333)


def test_without_a_dataset_both_limits_are_reached():
    assert assumed_worst_case(*RESIZING, grouped=True).sizes == ((800, 1333), (1333, 800))
    assert assumed_worst_case(*RESIZING, grouped=False).sizes == ((1333, 1333),)


def test_the_highest_and_the_widest_image_may_meet_in_a_batch():
    images = (500, 200, 640), (510, 640, 480)
    assert largest_sizes(*images, *RESIZING, grouped=True) == ((800, 1333), (1067, 800))
    assert largest_sizes(*images, *RESIZING, grouped=False) == ((1067, 1333),)


def test_samples_are_what_a_model_trains_on():
    samples = WorstCase(((64, 85),), 5, "a test").samples(2)
    assert [tuple(sample["image"].shape) for sample in samples] == [(3, 64, 85)] * 2
    assert [sample["image_id"] for sample in samples] == [0, 1]
    boxes = samples[0]["boxes"]
    assert boxes.shape == (5, 4)
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert bool((boxes >= 0).all())
    assert float(boxes[:, 2].max()) <= 85
