"""Starts d2go's own training command, in a process that is ready for d2go."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from d2scale.config.loading import flatten, load_yaml, resolve_config_path
from d2scale.d2go.environment import (
    ENV_MODULE,
    USERS_ENV_MODULE,
    put_back_quantization,
    setup_environment,
)
from d2scale.detectron2.user_errors import end_with_status_of_ranks, exit_on_user_error
from d2scale.errors import ConfigError, Fault, MissingPackageError
from d2scale.planning.methods import METHOD_NAMES, METHOD_PREFIX

OWN_RUNNER = "d2scale.Runner"
_OWN_MODULE = "d2scale.d2go.environment"


def train(config_file: str, words: Sequence[str], settings: Sequence[str]) -> None:
    """Train or evaluate as ``d2go.train_net --runner d2scale.Runner --config-file FILE`` does.

    ``words`` are d2go's other arguments, ``--runner`` may be among them, with KEY VALUE pairs at
    their end; ``settings`` are more KEY VALUE pairs. A recipe that names no scaling method keeps
    its total batch.

    Raises:
        MissingPackageError: if d2go, or a package that it needs, is not installed.
        SystemExit: after a mistake of the user, which has been printed.
    """
    train_net = import_d2go()
    prepare_parent()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runner", default=OWN_RUNNER)
    asked, rest = parser.parse_known_args(words)
    # Not raised: from now on print() writes a log line.
    with exit_on_user_error():
        if _knows_d2scale(asked.runner):
            if not _names_method(config_file, [*rest, *settings]):
                settings = [*settings, METHOD_NAMES.key, f"('{METHOD_PREFIX}keep_total',)"]
        else:
            _refuse_own_settings(asked.runner, config_file, [*rest, *settings])
    # Without --disable-post-mortem d2go asks for a debugger, and exits with 0 after a failure.
    start = ("--disable-post-mortem", "--runner", asked.runner, "--config-file", config_file)
    train_net.cli([*start, *rest, *settings])


def load_runner() -> Any:
    """Return d2scale's Runner, also where torch lacks what d2go imports."""
    put_back_quantization()
    from d2scale.d2go.runner import Runner

    return Runner


def prepare_parent() -> None:
    """Prepare the process that launches the ranks for what they hand back."""
    import torch
    from d2go.trainer.api import TestNetOutput, TrainNetOutput

    # It reads every rank's result by torch.load, which since torch 2.6 refuses classes that it was
    # not told of.
    torch.serialization.add_safe_globals([TrainNetOutput, TestNetOutput, OrderedDict])
    end_with_status_of_ranks()


def import_d2go() -> Any:
    """Return d2go's training command; this process and its children are ready for it."""
    users_module = os.environ.get(ENV_MODULE, _OWN_MODULE)
    if users_module not in ("", _OWN_MODULE):
        os.environ[USERS_ENV_MODULE] = users_module
    os.environ[ENV_MODULE] = _OWN_MODULE
    try:
        # Again, for detectron2 may have been imported before.
        setup_environment()
        from d2go.config import utils
        from d2go.tools import train_net
    except ModuleNotFoundError as error:
        package = f"{error.name}".partition(".")[0]
        advice = "install d2go with all that it needs: see 'With d2go' in README.md"
        raise MissingPackageError(package, "--engine d2go", advice) from error
    # What d2go has for prefixes of others; it also serves _BASE_ under d2go's own runners.
    utils.reroute_fb_config_path = resolve_config_path
    return train_net


def _knows_d2scale(runner: str) -> bool:
    """Return whether the class of this name has d2scale's config keys."""
    from d2go.runner import import_runner

    return runner == OWN_RUNNER or "D2SCALE" in import_runner(runner).get_default_cfg()


def _names_method(config_file: str, words: Sequence[str]) -> bool:
    return METHOD_NAMES.key in {*words, *dict(flatten(load_yaml(config_file)))}


def _refuse_own_settings(runner: str, config_file: str, words: Sequence[str]) -> None:
    """Raise a ConfigError if a runner without d2scale's keys is given one of them, or a method."""
    recipe = dict(flatten(load_yaml(config_file)))
    own = [word for word in [*recipe, *words] if word.startswith("D2SCALE.")]
    methods = [*recipe.get(METHOD_NAMES.key, ()), *words]
    own += [METHOD_NAMES.key for word in methods if METHOD_PREFIX in word]
    if own:
        allowed = f"{OWN_RUNNER} or a class derived from it, with {own[0]} in the recipe"
        advice = (
            "or name what a run has trained: trained_model_configs/model_final.yaml in its folder"
        )
        raise ConfigError([Fault("--runner", runner, allowed, advice)])
