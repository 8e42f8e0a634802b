"""Synchronised batch norm, which virtual ranks cannot hold apart, on fewer GPUs."""

import json

import pytest

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_shares_in_one_forward_each_are_the_clusters_step(world_size):
    from synchronised import synchronised_weights

    cluster = launch(synchronised_weights, (8, 3), Topology(4))
    fewer = launch(synchronised_weights, (8, 3), Topology(world_size))
    for name, value in cluster.items():
        # torch corrects the running variance for the count of values, detectron2 does not.
        if "running_var" not in name and "num_batches" not in name:
            assert (value - fewer[name]).abs().max() < 1e-13, name


def test_the_plan_synchronises_plain_batch_norm_of_few_images(tmp_path):
    from batch_norm_engines import with_detectron2

    (one, expected), (two, found) = (
        launch(with_detectron2, (str(tmp_path / str(ranks)),), Topology(ranks)) for ranks in (1, 2)
    )
    assert (one, two) == ("BatchNorm2d", "HostSyncBatchNorm")
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 1e-13, name
    assert json.loads((tmp_path / "2" / "plan.json").read_text())["sync_bn"]
