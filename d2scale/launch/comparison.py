"""What must be the same on every rank and machine of a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import d2scale
from d2scale.config.keys import OWN_OF_A_MACHINE
from d2scale.config.own_datasets import annotation_digests
from d2scale.errors import ConfigError
from d2scale.step import ranks

SAME_EVERYWHERE = "start the run with the same on every machine"


def versions() -> dict[str, str]:
    """Return the versions of what computes, by the name that a user is told.

    Ranks of different versions of torch may wait for each other for ever, and round otherwise.
    """
    return {
        "version of d2scale": d2scale.__version__,
        "version of torch": torch.__version__,
        "version of torchvision": _version("torchvision"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not known"


def refuse_different_ranks(
    settings: Mapping[str, Any], data: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    """Compare what each rank was given with what rank 0 was, and the versions of the packages.

    Args:
        settings: the recipe's, by dotted key; those that each machine may have of its own are left
            out, and own datasets are told by what their annotation files hold.
        data: digests of the datasets, by what they are of.
        options: of the command line.

    Raises:
        ConfigError: on every rank, with a line for each difference, but one for the data.
    """
    recipe = {key: value for key, value in settings.items() if key not in OWN_OF_A_MACHINE}
    given = sorted({**versions(), **recipe, **options}.items())
    ranks.refuse_differences(dict(given), SAME_EVERYWHERE)
    # In one exchange, for a rank that cannot read some file has fewer digests to compare.
    digests = {**data, **annotation_digests(settings, tested=True)}
    try:
        ranks.refuse_differences(digests, SAME_EVERYWHERE)
    except ConfigError as error:
        # Other images have other boxes, and both make another file.
        raise ConfigError(error.faults[:1]) from None
