"""Load configs: safe YAML, ``_BASE_`` chains, shipped files, and all faults at once."""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY, CfgNode

from d2scale.config.defaults import NUMBERS_OR_NONE, add_project_configs, get_cfg
from d2scale.config.keys import get_key
from d2scale.config.projects import entry_points
from d2scale.config.safe_yaml import LARGEST_TEXT, UnreadValue, parse_yaml
from d2scale.config.upstream import LOOK_ALIKES, MODEL, UNPLANNED_SECTIONS, engine_of
from d2scale.config.value_rules import names, of_any_size, or_none, type_of_default
from d2scale.errors import ConfigError, Fault

SHIPPED_PREFIX = "d2scale://"

# Where the prefixes that d2go understands point to, inside the packages that own them.
_UPSTREAM_PREFIXES = {
    "d2go://": ("d2go", ""),
    "detectron2go://": ("d2go", "configs"),
    "detectron2://": ("detectron2", "model_zoo/configs"),
}

_MOST_FILES = 200  # of one config, each as often as a _BASE_ names it

_DATASETS = ("DATASETS.TRAIN", "DATASETS.TEST")

# In a recipe of another engine these sections must still make sense to d2scale.
_PLANNING_SECTIONS = ("SOLVER", "TEST", "D2SCALE", "QUANTIZATION", "MODEL_EMA")


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with d2scale, by the name after ``d2scale://``."""
    packages = {"": "d2scale.configs"}
    packages |= {f"{entry.name}/": entry.value for entry in entry_points(group="d2scale.recipes")}
    files: dict[str, Path] = {}
    for prefix, package in packages.items():
        paths = [Path(str(file)) for file in importlib.resources.files(package).iterdir()]
        files |= {prefix + path.name: path for path in paths if path.suffix == ".yaml"}
    return dict(sorted(files.items()))


def resolve_config_path(path: str) -> str:
    """Turn ``d2scale://NAME.yaml`` and the prefixes of installed upstream packages into a file.

    ConfigError for a shipped name that does not exist, a package that is not installed, or an
    address on the network.
    """
    if path.startswith(SHIPPED_PREFIX):
        known = shipped_configs()
        name = path.removeprefix(SHIPPED_PREFIX)
        if name not in known:
            raise _path_fault(path, SHIPPED_PREFIX + "{" + ", ".join(known) + "}")
        return str(known[name])
    for prefix, (package, folder) in _UPSTREAM_PREFIXES.items():
        if path.startswith(prefix):
            # find_spec of a top-level package locates it without importing it.
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise _path_fault(path, f"a path, while {package} is not installed")
            root = spec.submodule_search_locations[0]
            return os.path.join(root, folder, path.removeprefix(prefix))
    if "://" in path:
        raise _path_fault(path, f"a file, or {SHIPPED_PREFIX}NAME.yaml")
    return os.path.expanduser(path)


def _path_fault(path: str, allowed: str, advice: str = "check the name") -> ConfigError:
    return ConfigError([Fault("config file", path, allowed, advice)])


def load_yaml(path: str, parse: Callable[[str], Any] = parse_yaml) -> dict[str, Any]:
    """Read a config and everything its ``_BASE_`` keys name, later files winning, nested.

    ``parse`` turns the text of one file into its content; d2scale's own runs no Python. ConfigError
    for a missing or unreadable file, YAML that is broken or far too large, and a chain of
    ``_BASE_`` that does not end.
    """
    tries = iter(range(_MOST_FILES))
    return _load_chain(os.path.abspath(resolve_config_path(path)), (), parse, tries)


def _load_chain(
    path: str, above: tuple[str, ...], parse: Callable[[str], Any], tries: Iterator[int]
) -> dict[str, Any]:
    if path in above:
        chain = " -> ".join([*above[above.index(path) :], path])
        raise ConfigError([Fault(BASE_KEY, chain, "a chain that ends", "remove one of the links")])
    # Two bases that name the same two bases, and so on, are read twice as often on every level.
    if next(tries, None) is None:
        allowed = f"at most {_MOST_FILES} files to read"
        raise ConfigError([Fault(BASE_KEY, path, allowed, "name fewer files")])
    content = _read_yaml(path, parse)
    bases = content.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        allowed = "a file name, or a list of them"
        raise ConfigError([Fault(f"{BASE_KEY} in {path}", bases, allowed, "correct it")])
    merged: dict[str, Any] = {}
    for base in bases:
        resolved = os.path.join(os.path.dirname(path), resolve_config_path(base))
        _merge_mapping(merged, _load_chain(os.path.abspath(resolved), (*above, path), parse, tries))
    _merge_mapping(merged, content)
    return merged


def _read_yaml(path: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = parse(file.read(LARGEST_TEXT + 1))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise _path_fault(path, "a readable YAML file", f"check the path ({reason})") from None
    # A date or a number that cannot be is a plain ValueError, as is a size that no config has.
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = path if line is None else f"{path}, line {line + 1}"
        problem = getattr(error, "problem", None) or f"it cannot be parsed ({error})"
        raise _path_fault(where, "plain YAML", f"mend it: {problem}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise _path_fault(path, "YAML of the form KEY: value", "check the file")
    return content


def _merge_mapping(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping):
            # A mapping of its own for each key: two of them may be aliases of one.
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge_mapping(target[key], value)
        else:
            target[key] = value


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_cfg(path: str, opts: Sequence[str] = ()) -> CfgNode:
    """Load a config for the default engine: every key must be one that it knows.

    ``opts`` are ``KEY VALUE`` pairs that win over the file. All faults are raised together, as a
    ConfigError.
    """
    cfg = get_cfg()
    add_project_configs(cfg)
    settings = {**dict(flatten(load_yaml(path))), **dict(parse_opts(opts))}
    engine, _ = engine_of(settings)
    other = "detectron2" if engine == "detectron2" else "d2go"
    try:
        _merge(cfg, settings.items(), partial(_faults_of_unknown_key, other))
    except ConfigError as error:
        if engine == "default" or MODEL not in settings:
            raise
        # The recipe of a model that is not here is full of keys that nothing here knows.
        models = sorted(entry.name for entry in entry_points(group="d2scale.models"))
        allowed = f"a model of the default engine ({', '.join(models)})"
        fault = Fault(MODEL, settings[MODEL], allowed, f"train with --engine {other}")
        raise ConfigError([fault]) from error
    return cfg


def load_recipe(path: str, opts: Sequence[str] = ()) -> tuple[CfgNode, dict[str, Any]]:
    """Load a recipe of any engine for planning.

    Returned are the config, as :func:`recipe_from_settings` has it, and the recipe's own settings
    by dotted key, those behind a Python tag as UnreadValue. ``opts`` are ``KEY VALUE`` pairs that
    win over the file. ConfigError with all faults together.
    """
    settings = dict(flatten(load_yaml(path)))
    overrides = parse_opts(opts)
    defaults = get_cfg()
    add_project_configs(defaults)
    known = dict(flatten(defaults))
    unknown = [pair for pair in overrides if pair[0] not in {**known, **settings}]
    if faults := [unknown_key_fault(key, value, known) for key, value in unknown]:
        raise ConfigError(faults)
    settings.update(overrides)
    return recipe_from_settings(settings), settings


def recipe_from_settings(settings: Mapping[str, Any]) -> CfgNode:
    """Return a recipe's config for planning: its settings by dotted key, and d2go's defaults.

    Keys that planning does not read are passed over, for other runners bring their own, unless
    they look like a misspelling of one that it reads. A value behind a Python tag is not run: it is
    a fault where planning needs it, and elsewhere the config keeps its default. ConfigError with
    all faults together.
    """
    cfg = get_cfg()
    read = {key: value for key, value in settings.items() if not _is_unread_for_others(key, value)}
    _merge(cfg, read.items(), _faults_of_misspelt_key)
    return cfg


def _is_unread_for_others(key: str, value: Any) -> bool:
    """Return whether a value is behind a Python tag, and not one that planning needs."""
    return isinstance(value, UnreadValue) and key.split(".")[0] not in _PLANNING_SECTIONS


def parse_opts(opts: Sequence[str]) -> list[tuple[str, Any]]:
    """Turn ``[KEY, VALUE, KEY, VALUE]`` into pairs; a missing value is a ConfigError."""
    if len(opts) % 2:
        raise ConfigError([Fault("KEY VALUE", " ".join(opts), "pairs", f"give {opts[-1]} a value")])
    return list(zip(opts[::2], opts[1::2], strict=True))


def _merge(
    cfg: CfgNode,
    settings: Iterable[tuple[str, Any]],
    judge_unknown: Callable[[str, Any, Mapping[str, Any]], list[Fault]],
) -> None:
    """Set every known key in ``cfg``, in place; raise all faults together."""
    known = dict(flatten(cfg))
    faults = []
    for key, value in settings:
        if isinstance(value, UnreadValue):
            allowed = "a value without a Python tag, which d2scale does not run"
            faults.append(Fault(key, str(value), allowed, "write the value itself"))
        elif key in known:
            faults += _set_checked(cfg, key, value, known[key])
        elif any(name.startswith(f"{key}.") for name in known):
            if value != {}:
                faults.append(Fault(key, value, "a section of keys", "give its keys, or remove it"))
        else:
            faults += judge_unknown(key, value, known)
    if faults:
        raise ConfigError(faults)


def _set_checked(cfg: CfgNode, key: str, value: Any, default: Any) -> list[Fault]:
    may_be_none = key in NUMBERS_OR_NONE
    rule = or_none(type_of_default(key, 0.0)) if may_be_none else type_of_default(key, default)
    try:
        cfg.merge_from_list([key, _as_float(value) if isinstance(default, float) else value])
    except (ValueError, SyntaxError):
        return [rule.fault(value)]
    # yacs lets None replace anything, and looks into no list.
    value = get_key(cfg, key)
    more = names(key, "names of datasets") if key in _DATASETS else of_any_size(key)
    return rule.faults(value) or more.faults(value)


def _as_float(value: Any) -> Any:
    """Accept 1 where 1.0 is meant; leave everything else to the type check."""
    try:
        return float(value) if type(value) in (int, str) else value
    except (ValueError, OverflowError):
        return value


def unknown_key_fault(
    key: str, value: Any, known: Mapping[str, Any], otherwise: str = "remove it"
) -> Fault:
    """Return the fault of a key that is not in ``known``, with the nearest one that is."""
    similar = _similar(key, known)
    advice = f"did you mean {similar[0]}?" if similar else otherwise
    return Fault(key, value, "keys that exist", advice)


def _similar(key: str, known: Mapping[str, Any]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.8)


def _faults_of_unknown_key(
    other_engine: str, key: str, value: Any, known: Mapping[str, Any]
) -> list[Fault]:
    advice = f"remove it, or train with --engine {other_engine}"
    fault = unknown_key_fault(key, value, known, advice)
    return [replace(fault, allowed="keys that the default engine honours")]


def _faults_of_misspelt_key(key: str, value: Any, known: Mapping[str, Any]) -> list[Fault]:
    if key in LOOK_ALIKES or key.startswith(UNPLANNED_SECTIONS):
        return []
    planning = {k: v for k, v in known.items() if k.split(".")[0] in _PLANNING_SECTIONS}
    fault = unknown_key_fault(key, value, planning)
    return [fault] if key.startswith("D2SCALE.") or _similar(key, planning) else []
