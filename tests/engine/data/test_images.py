from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from d2scale.coco.dataset import load_dataset
from d2scale.coco.images import check_size, oddities
from d2scale.coco.sizes import output_size
from d2scale.engine.data.images import read_image, resize_and_flip
from d2scale.engine.data.transforms import Augmentation
from d2scale.errors import DataError


def smooth_picture(width=48, height=32, mode="RGB"):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pixels_of(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("L", "bmp")],
)
def test_every_kind_of_file_becomes_rgb(tmp_path, mode, kind):
    path = tmp_path / f"a.{kind}"
    smooth_picture(mode=mode).save(path)
    image = read_image(str(path))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 32, 48)
    with Image.open(path) as expected:
        assert torch.equal(image, pixels_of(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    picture = smooth_picture()
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    with Image.open(path) as expected:
        assert torch.equal(read_image(str(path)), pixels_of(ImageOps.exif_transpose(expected)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    smooth_picture().save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    assert read_image(str(path)).shape == (3, 32, 48)


@pytest.mark.parametrize("spoil", ["missing", "empty", "text", "cut", "folder"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_unreadable_files_are_named(tmp_path, spoil, kind):
    path = tmp_path / f"a.{kind}"
    smooth_picture(200, 200).save(path)
    content = path.read_bytes()
    path.unlink()
    if spoil == "folder":
        path.mkdir()
    elif spoil != "missing":
        path.write_bytes({"empty": b"", "text": b"no image", "cut": content[:800]}[spoil])
    with pytest.raises(DataError) as caught:
        read_image(str(path))
    assert str(caught.value).startswith(f"image file is {str(path)!r}; allowed: a readable image (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint16, [0, 256]),
        (np.int32, [0, 70000]),
        (np.int32, [-1, 9]),
        (np.float32, [0, 0.5]),
        (np.float32, [0, np.nan]),
    ],
)
def test_deep_images_are_read_as_they_are_or_refused(tmp_path, dtype, values):
    path = str(tmp_path / "a.tif")
    Image.fromarray(np.array([[0, 7, 255]], dtype)).save(path)
    assert read_image(path).tolist() == [[[0, 7, 255]]] * 3
    Image.fromarray(np.array([values], dtype)).save(path)
    with pytest.raises(DataError, match="allowed: an image of whole numbers from 0 to 255; it has"):
        read_image(path)


def test_no_program_is_started_for_an_image_of_another_format(tmp_path):
    path = tmp_path / "a.jpg"
    smooth_picture().save(path, format="EPS")
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        read_image(str(path))
    assert oddities(str(path)) == []


@pytest.mark.parametrize("size", [(64, 96), (20, 31), (32, 48), (40, 30)])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_is_pils(size, flip):
    """detectron2's order: BGR, PIL's bilinear resize, then mirroring."""
    picture = smooth_picture()
    result = resize_and_flip(pixels_of(picture), Augmentation(*size, flip), "BGR")
    expected = np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR))[:, :, ::-1]
    expected = expected[:, ::-1] if flip else expected
    assert result.shape == (3, *size)
    assert result.is_contiguous()
    difference = result.int() - torch.from_numpy(expected.transpose(2, 0, 1).astype(np.int32))
    assert difference.abs().max() <= 2
    rgb = resize_and_flip(pixels_of(picture), Augmentation(*size, flip), "RGB")
    assert torch.equal(rgb.flip(0), result)


def test_wrong_sizes_are_told():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    check_size("a.jpg", image.shape[1:], 20, 30)
    with pytest.raises(DataError, match=r"size of image a.jpg is '30 x 20'; allowed: 20 x 30"):
        check_size("a.jpg", image.shape[1:], 30, 20)


def test_real_images_are_as_pil_resizes_them(real_coco):
    records = load_dataset("coco_2017_val").records
    for record in (records[number] for number in range(5)):
        image = read_image(record.file_name)
        check_size(record.file_name, image.shape[1:], record.height, record.width)
        for short_edge in (800, 672, 200):
            height, width = output_size(record.height, record.width, short_edge, 1333)
            result = resize_and_flip(image, Augmentation(height, width, False), "RGB")
            with Image.open(record.file_name) as picture:
                expected = pixels_of(picture.resize((width, height), Image.Resampling.BILINEAR))
            difference = (result.int() - expected.int()).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.02
