"""Decide whether batch norm takes its statistics from the images of all GPUs at once."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.config.value_rules import one_of
from d2scale.errors import ConfigError, Fault

SYNC_BN = "D2SCALE.SYNC_BN"
SYNC_BN_RULE = one_of(SYNC_BN, ("auto", "on", "off"))
# Of fewer images the statistics are so noisy that results suffer (Wu and He, Group Normalization:
# an error of ImageNet that is flat down to 8 images a GPU and rises below).
_ENOUGH_IMAGES = 8
_LIMITS = (
    "ranks then wait for each other inside a forward, so an out-of-memory error ends the run, "
    "whatever D2SCALE.ON_OOM says"
)


def choose_sync_bn(
    asked: str,
    sizes: Sequence[Sequence[int]],
    *,
    recipe_has_it: bool,
    trains_batch_norm: bool,
    virtual_ranks: int,
) -> tuple[bool, tuple[str, ...]]:
    """Return whether batch norm is synchronised, and the reasons worth telling.

    ``auto`` keeps what the recipe has, and synchronises where fewer than 8 images are normalised.

    Args:
        asked: auto, on or off.
        sizes: images of each micro-batch of a step, by rank.
        recipe_has_it: the recipe's batch norm is synchronised as written.
        trains_batch_norm: the model trains batch norm that is not synchronised.
        virtual_ranks: that the GPUs run in turn; 0: none.

    Raises:
        ConfigError: if it would be synchronised and ranks take different numbers of forwards.
    """
    if obstacle := _nothing_to_synchronise(sizes, recipe_has_it or trains_batch_norm):
        return False, (f"{SYNC_BN} on has no effect: {obstacle}",) * (asked == "on")
    if asked == "off":
        note = "batch norm is not synchronised, as asked, though the recipe's is"
        return False, (note,) * recipe_has_it
    reason = "so is the recipe's" if recipe_has_it else "as asked"
    if asked == "auto" and not recipe_has_it:
        reason, obstacle = _need_of(sizes, virtual_ranks)
        if obstacle:
            return False, (f"batch norm is not synchronised: {obstacle}",)
    elif differ := _different_forwards(sizes):
        advice = "use GPUs that share the step's images evenly"
        raise ConfigError([Fault(SYNC_BN, asked, f"off where {differ}", advice)])
    parts = ("its statistics are those of one micro-batch of each GPU",) * (len(sizes[0]) > 1)
    return True, (f"batch norm is synchronised over {len(sizes)} GPUs: {reason}", *parts, _LIMITS)


def _need_of(sizes: Sequence[Sequence[int]], virtual_ranks: int) -> tuple[str, str]:
    """Return why batch norm should be synchronised, and what speaks against it."""
    images = max(map(max, sizes))
    if virtual_ranks:
        kept = "each virtual rank has the statistics of its own images, as on the recipe's cluster"
        return "", kept
    if images >= _ENOUGH_IMAGES:
        return "", f"{images} images in a forward of a GPU are enough"
    few = f"{images} images in a forward of a GPU are fewer than {_ENOUGH_IMAGES}"
    return few, _different_forwards(sizes)


def _different_forwards(sizes: Sequence[Sequence[int]]) -> str:
    """Return which numbers of forwards the ranks take in a step; empty: all the same."""
    counts = sorted({len(rank) for rank in sizes})
    return f"GPUs take {' or '.join(map(str, counts))} forwards in a step" * (len(counts) > 1)


def _nothing_to_synchronise(sizes: Sequence[Sequence[int]], trains_batch_norm: bool) -> str:
    if len(sizes) == 1:
        return "there is one GPU"
    return "" if trains_batch_norm else "the model trains no batch norm"


def refuse_sync_bn_without_steps(asked: str) -> None:
    """Raise a ConfigError where it is asked for and d2scale takes no steps."""
    if asked == "on":
        allowed = "auto or off where d2scale does not take the optimizer steps"
        advice = "train with d2scale train, or set the recipe's own norm to SyncBN"
        raise ConfigError([Fault(SYNC_BN, asked, allowed, advice)])
