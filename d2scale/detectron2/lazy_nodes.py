"""Mistakes in what a LazyConfig says of things to build, told before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from d2scale.config.loading import flatten, unknown_key_fault
from d2scale.errors import Fault

_TARGET = "_target_"
# What a training or an evaluation builds.
_BUILT = ("model", "optimizer", "lr_multiplier", "dataloader")
# Its keys are judged as those of a YAML recipe are.
_JUDGED_ELSEWHERE = "d2scale."


def override_faults(cfg: DictConfig, overrides: Sequence[str]) -> list[Fault]:
    """Return the overrides of keys that a LazyConfig lacks and that resemble one it has.

    detectron2 adds keys that are not there. Those of something to build are arguments, which
    :func:`node_faults` judges; ``+key=value`` says that a key is new.
    """
    known = {key: None for key, _ in flatten(OmegaConf.to_container(cfg, resolve=False))}
    faults = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.is_add() or key.startswith(_JUDGED_ELSEWHERE) or _is_known(cfg, key):
            continue
        fault = unknown_key_fault(key, override.value(), known, otherwise="")
        if fault.advice:
            faults.append(replace(fault, advice=f"{fault.advice} +{key}=... adds a key"))
    return faults


def _is_known(cfg: DictConfig, key: str) -> bool:
    """Return whether a key is there, or is an argument of something to build."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, DictConfig) or _TARGET in node:
            return True
        if part not in node:
            return False
        node = node.get(part)
    return True


def node_faults(cfg: DictConfig) -> list[Fault]:
    """Return what a LazyConfig wants to build and cannot, and the arguments that it does not take.

    What is named is imported, but not called.
    """
    return [fault for key in _BUILT for fault in _faults_below(cfg.get(key), key)]


def _faults_below(node: Any, key: str) -> Iterator[Fault]:
    if isinstance(node, ListConfig):
        for place, entry in enumerate(node):
            yield from _faults_below(entry, f"{key}[{place}]")
    if not isinstance(node, DictConfig):
        return
    if _TARGET in node:
        yield from _faults_of_call(node, key)
    for name in node:
        if not OmegaConf.is_missing(node, name):  # given when the training begins
            yield from _faults_below(node.get(name), f"{key}.{name}")


def _faults_of_call(node: DictConfig, key: str) -> Iterator[Fault]:
    target = function = node.get(_TARGET)
    if isinstance(target, str):
        try:
            function = locate(target)
        except Exception as error:  # of the module that is imported
            reason = " ".join(str(error).split())
            advice = f"correct it, or install it ({type(error).__name__}: {reason})"
            yield Fault(f"{key}.{_TARGET}", target, "a name that can be imported", advice)
            return
    if isinstance(function, DictConfig) or not callable(function):
        return  # built first, or refused by detectron2
    if parameters := _parameters(function):
        known = {f"{key}.{name}": None for name in parameters}
        name = getattr(function, "__qualname__", str(function))
        for argument in set(node) - {_TARGET, *parameters}:
            fault = unknown_key_fault(f"{key}.{argument}", node.get(argument), known)
            yield replace(fault, allowed=f"arguments of {name}")


def _parameters(function: Callable[..., Any]) -> Sequence[str]:
    """Return the arguments of a function; none if they are not known, or if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not of Python
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ()
    return [parameter.name for parameter in parameters]
