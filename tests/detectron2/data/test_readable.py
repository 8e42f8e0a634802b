"""An image that cannot be read is one line, from a loader's workers too."""

import pytest

from d2scale.coco.shapes import write_shapes_dataset


@pytest.fixture
def entries(tmp_path):
    """Entries of a dataset whose second image is cut short."""
    images = write_shapes_dataset(tmp_path, train_images=2, val_images=1, seed=0) / "coco/train2017"
    whole, cut = sorted(images.iterdir())
    cut.write_bytes(whole.read_bytes()[:500])
    return [
        {"file_name": str(path), "height": 8, "width": 8, "image_id": number}
        for number, path in enumerate((whole, cut))
    ]


def mapper(entry):
    from detectron2.data.detection_utils import read_image

    return {"image": read_image(entry["file_name"])}


def loader_of_evaluation(entries, workers):
    from detectron2.data import build_detection_test_loader

    from d2scale.detectron2.data.readable import tell_unreadable_images

    loader = build_detection_test_loader(entries, mapper=mapper, num_workers=workers)
    return tell_unreadable_images(loader)


def loader_of_training(entries, workers):
    from detectron2.data import build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler

    from d2scale.detectron2.data.loader import train_loader

    options = {"sampler": TrainingSampler(2, shuffle=False), "aspect_ratio_grouping": False}
    loader = build_detection_train_loader(
        entries, mapper=mapper, total_batch_size=1, num_workers=workers, **options
    )
    return train_loader(loader, range(1), 1, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("build", [loader_of_training, loader_of_evaluation])
def test_the_file_is_named(entries, build, workers):
    from d2scale.detectron2.data.readable import UnreadableImageError

    samples = iter(build(entries, workers))
    next(samples)
    with pytest.raises(UnreadableImageError) as raised:
        next(samples)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"image file is '{entries[1]['file_name']}'; allowed: a readable image")


def test_an_image_of_another_size_is_named(entries):
    from detectron2.data.detection_utils import check_image_size, read_image

    from d2scale.detectron2.data.readable import ReadableMapper, UnreadableImageError

    def checked(entry):
        check_image_size(entry, read_image(entry["file_name"]))

    with pytest.raises(UnreadableImageError, match="8 x 8, as its annotation file says"):
        ReadableMapper(checked)(entries[0])


def test_another_error_of_a_mapper_is_left_alone(entries):
    from d2scale.detectron2.data.readable import ReadableMapper

    def broken(entry):
        raise KeyError("a bug")

    entry = {"file_name": entries[0]["file_name"]}
    with pytest.raises(KeyError, match="a bug"):
        ReadableMapper(broken)(entry)
