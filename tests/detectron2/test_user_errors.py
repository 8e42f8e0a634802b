"""What raises while detectron2 builds a model is most often a mistake in the recipe."""

from __future__ import annotations

import errno

import pytest

from d2scale.errors import ConfigError, D2ScaleError
from d2scale.planning.schedule import Schedule

pytest.importorskip("detectron2", reason="needs detectron2, which is not on the package index")


@pytest.fixture
def building():
    from d2scale.detectron2.user_errors import faults_of_building

    return faults_of_building("MODEL.META_ARCHITECTURE", "RetinaNet")


def test_a_value_that_nothing_can_be_built_of_is_one_line(building):
    line = r"'RetinaNet'.*KeyError: 'p9', in .*user_errors\.py:"
    with pytest.raises(ConfigError, match=line), building:
        raise KeyError("p9")


def test_a_full_disk_is_no_mistake_in_the_recipe(building):
    with pytest.raises(D2ScaleError, match="make room") as raised, building:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not isinstance(raised.value, ConfigError)


def test_a_lack_of_memory_is_no_mistake_in_the_recipe(building):
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError) as raised, building:
        raise error
    assert raised.value is error


def test_a_fault_of_d2scale_keeps_its_traceback(building):
    with pytest.raises(TypeError), building:
        Schedule.from_cfg(None)
