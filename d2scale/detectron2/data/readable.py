"""Images that a mapper of detectron2 or d2go cannot read, told in one line that names the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from d2scale.coco.images import check_size, read_rgb
from d2scale.detectron2.data.private_upstream import replace_function
from d2scale.errors import ConfigError, D2ScaleError

logger = logging.getLogger(__name__)


class UnreadableImageError(D2ScaleError):
    """The line of an image that cannot be read, in whichever process it was met."""

    def __init__(self, message: str) -> None:
        # torch's loader raises a worker's error anew, with a traceback before its message.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class ReadableMapper:
    """A mapper that tells of an image that the mapper it is made of cannot read.

    Args:
        mapper: from an entry of a dataset, as detectron2 has it, to a sample.
    """

    def __init__(self, mapper: Callable[[Any], Any]) -> None:
        self._mapper = mapper
        self._left_out: set[str] = set()

    def __repr__(self) -> str:
        return repr(self._mapper)

    def __call__(self, entry: Any) -> Any:
        """Return the mapper's sample.

        d2go's mappers return None for whatever fails, and its loader then takes another image:
        where the image is to blame, a line of the log says so.

        Raises:
            UnreadableImageError: if it raises, and the image is to blame.
        """
        try:
            sample = self._mapper(entry)
        except D2ScaleError:
            raise
        except Exception as error:
            if (line := _fault_of_image(entry)) is not None:
                raise UnreadableImageError(line) from error
            raise
        if sample is None and (line := _fault_of_image(entry)) and line not in self._left_out:
            self._left_out.add(line)
            logger.warning("An image is left out: %s", line)
        return sample


def _fault_of_image(entry: Any) -> str | None:
    """Return what is wrong with the image file of a dataset's entry, None if nothing is."""
    name = entry.get("file_name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or "://" in name:
        return None
    try:
        size = read_rgb(name).shape[:2]
        if "height" in entry and "width" in entry:
            check_size(name, size, entry["height"], entry["width"])
    except ConfigError as error:
        return str(error)
    return None


def tell_unreadable_images(loader: Any) -> Any:
    """Let the mapper of a loader that detectron2 builds for evaluation be a ReadableMapper."""
    if isinstance(loader, DataLoader):
        replace_function(loader.dataset, ReadableMapper)
    return loader
