"""Any image file is read, or refused by name; nothing else is raised."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from d2scale.coco.images import oddities, read_rgb
from wrong_values import cases, may_be_refused, wrong_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # PIL warns of much that is broken
_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "EPS": ("RGB",),
}
_KINDS = [(kind, mode) for kind, modes in _MODES.items() for mode in modes]


def whole_file(kind, mode, orientation=None):
    pixels = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10) * 2
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    content, options = io.BytesIO(), {}
    if orientation is not None and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    image.save(content, kind, **options)
    return content.getvalue()


def claiming(width, height):
    """A PNG that says that it is so large."""
    content = whole_file("PNG", "RGB")
    head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


FILES = st.tuples(st.sampled_from(_KINDS), st.none() | st.integers(0, 2**16 - 1)).map(
    lambda drawn: whole_file(*drawn[0], drawn[1])
)
SIZES = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@cases(120)
@given(content=FILES.flatmap(wrong_bytes) | FILES | st.builds(claiming, SIZES, SIZES))
@example(content=claiming(2**31, 2**31))
@example(content=claiming(0, 5))
@example(content=b"")
def test_any_image_is_read_or_refused(content, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert all(isinstance(text, str) for text in oddities(str(path)))
    image = np.zeros((1, 1, 3), np.uint8)
    with may_be_refused():
        image = read_rgb(str(path))
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
