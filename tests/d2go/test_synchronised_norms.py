"""Batch norm of few images a GPU, in d2go's own training."""

import json

import pytest

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_plan_synchronises_plain_batch_norm_of_few_images(tmp_path):
    from batch_norm_engines import with_d2go

    (one, expected), (two, found) = (
        launch(with_d2go, (str(tmp_path / str(ranks)),), Topology(ranks)) for ranks in (1, 2)
    )
    assert (one, two) == ("BatchNorm2d", "HostSyncBatchNorm")
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 1e-12, name
    assert json.loads((tmp_path / "2" / "plan.json").read_text())["sync_bn"]
