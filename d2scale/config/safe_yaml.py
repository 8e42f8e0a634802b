"""Parse YAML without running anything, and as detectron2 does, which runs Python tags."""

from __future__ import annotations

import logging
from typing import Any

import yaml

logger = logging.getLogger(__name__)

# Far above any config: the zoo's largest has 5 KB, and no more than a few hundred values.
LARGEST_TEXT = 2**19  # characters of a file
_MOST_NODES = 50_000  # with every alias written out
_DEEPEST = 50

_PYTHON_TAG = "tag:yaml.org,2002:python/"


class UnreadValue(str):
    """A value behind a Python tag, such as ``!!python/object/apply:eval``, as it is written."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Reads plain data; a tuple is that too."""


def _unread(loader: _Loader, _: str, node: yaml.Node) -> UnreadValue:
    start, end = node.start_mark, node.end_mark
    text = str(start.buffer)  # the whole text, for it was not a file that was parsed
    return UnreadValue(text[start.pointer : end.pointer].rstrip("\0").strip())


def _tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_multi_constructor(_PYTHON_TAG, _unread)
_Loader.add_constructor(f"{_PYTHON_TAG}tuple", _tuple)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text, with each value behind a Python tag an UnreadValue.

    ``!!python/tuple`` alone is read. yaml.YAMLError or ValueError for text that is no YAML, or that
    is larger than a config can be.
    """
    _check_size(text)
    return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader that builds no objects


def parse_yaml_as_detectron2(text: str) -> Any:
    """Return the content of a YAML text as detectron2's own loader does: Python tags are run.

    Only for training by an engine that is built on detectron2. ValueError for a tag that fails.
    """
    _check_size(text)
    # Not yaml.safe_load, in whose place d2go puts one of its own while it loads.
    try:
        return yaml.load(text, yaml.SafeLoader)
    except yaml.constructor.ConstructorError:
        logger.warning("The config holds Python tags, which detectron2 runs: be sure of its origin")
    try:
        return yaml.load(text, yaml.UnsafeLoader)  # noqa: S506  # the rule of its engines
    except Exception as error:
        raise ValueError(f"a Python tag fails with {type(error).__name__}: {error}") from error


def _check_size(text: str) -> None:
    """Raise ValueError for text that takes long to build, or more memory than it seems to.

    Aliases of aliases grow without bound when they are merged, compared or printed (a "billion
    laughs"). The graph of nodes is small, so it is judged before anything is built.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"more than {LARGEST_TEXT} characters")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise _too_deep() from None
    if root is not None and _count(root, {}, 0) > _MOST_NODES:
        raise ValueError(f"more than {_MOST_NODES} values, with every alias written out")


def _count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the nodes of a tree, with every alias written out; ``counts`` has those known."""
    if depth > _DEEPEST:  # or it holds itself
        raise _too_deep()
    if id(node) not in counts:
        content = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in content for child in pair] if pairs else content
        counts[id(node)] = 1 + sum(_count(child, counts, depth + 1) for child in children)
    return counts[id(node)]


def _too_deep() -> ValueError:
    return ValueError(f"more than {_DEEPEST} levels, or a value that holds itself")
