"""Any words behind any command, and any environment, are used or refused."""

from __future__ import annotations

import os
from contextlib import suppress
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wrong_values import VALUES, cases

pytestmark = pytest.mark.usefixtures("place")
BASE = "d2scale://MetaFCOS/small-cpu.yaml"
TRAIN = ("train", "--engine", "default", "--config-file", BASE)
OPTIONS = {
    ("plan", BASE): "--gpus --gpu-memory-gib --method --lr-rule --ims-per-gpu --profile --noise "
    "--explore --format -o",
    TRAIN: "--num-gpus --num-processes --num-machines --machine-rank --dist-url --join-timeout "
    "--method --lr-rule --resume --allow-changed-recipe --eval-only",
    ("data", "coco_2017_val"): "--images --name --read -o",
    ("report", "."): "--published -o",
    ("visualize", "."): "--input --config-file -o --score-threshold --tile --overlap",
    ("memory", BASE): "--device --engine --explore -o",
    ("advise", "."): "--steps --minutes --max-ims-per-gpu --format -o",
    ("benchmark", BASE): "--device --only --images --warmup --steps --ims-per-gpu --format -o",
    ("doctor",): "--x",
}
WORDS = st.one_of(
    st.sampled_from(["", "0", "-1", "1", "3", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 5000]),
    st.sampled_from(["\0", "\udcff", "a\nb", "\x1b[31m", "x" * 5000, ".", "..", "~nobody/x", "-"]),
    st.sampled_from(["tcp://x:1", "tcp://[::1", "tcp://h:99999999", "d2scale://", "d2go://x"]),
    st.sampled_from(
        ["max_memory", "auto", "gain", "json", "yaml", "cpu", "cuda", "x.jpg", "a.yaml"]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.text("abc .:=-01\t<>|é", max_size=6),
)
COMMANDS = st.sampled_from(sorted(OPTIONS)).flatmap(
    lambda command: st.lists(
        st.tuples(st.sampled_from(OPTIONS[command].split()), WORDS), max_size=3
    ).map(lambda pairs: [*command, *(word for pair in pairs for word in pair)])
)


@cases(80)
@given(words=COMMANDS, more=st.lists(WORDS, max_size=2))
@example(words=["plan", BASE, "--lr-rule", ""], more=[])
def test_any_options_are_used_or_refused(words, more, refused_well):
    refused_well(*words, *more)


VARIABLES = [
    "DETECTRON2_DATASETS",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_USE_AGENT_STORE",
    "D2SCALE_WEIGHTS",
    "FVCORE_CACHE",
    "HOME",
    "TMPDIR",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "COLUMNS",
    "CUDA_VISIBLE_DEVICES",
]


@cases(40)
@given(
    variables=st.dictionaries(st.sampled_from(VARIABLES), WORDS | VALUES.map(str), max_size=4),
    command=st.sampled_from([TRAIN, ("doctor",), ("data", "coco_2017_val"), ("plan", BASE)]),
)
def test_any_environment_is_used_or_refused(variables, command, refused_well):
    possible = {
        name: text
        for name, text in variables.items()
        if "\0" not in text and not any("\ud800" <= char < "\udc80" for char in text)
    }
    with mock.patch.dict(os.environ, possible):
        refused_well(*command)


@cases(60)
@given(name=WORDS | VALUES.map(str), content=st.none() | VALUES.map(str) | st.binary(max_size=30))
def test_any_path_is_looked_at_or_refused(name, content, refused_well, tmp_path):
    name = name.replace("/", "")
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    with suppress(OSError, ValueError):  # no file can have such a name
        (tmp_path / f"{name}.json").write_bytes(content or b"")
    refused_well("data", str(tmp_path / f"{name}.json"))
    refused_well("data", str(tmp_path))
    refused_well("data", name)
    refused_well("data", "coco_2017_val", "--images", name)
