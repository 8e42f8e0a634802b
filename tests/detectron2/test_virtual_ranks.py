"""Virtual ranks of detectron2's models train what its own trainer does on a cluster."""

import pytest
import torch

from d2scale.launch.launch import launch
from d2scale.launch.topology import Topology

MODELS = ("RetinaNet", "Mask R-CNN", "Panoptic FPN")


def trained(processes, name, trainings, *arguments):
    import upstream_steps

    function = getattr(upstream_steps, name)
    arguments = (function, trainings, *arguments)
    return launch(upstream_steps.take_turns, arguments, Topology(processes), use_cuda=False)


@pytest.mark.usefixtures("one_thread")
def test_one_process_trains_what_two_of_detectron2_do():
    from upstream_steps import Training

    trainings = [Training(model, virtual_ranks=2, steps=3) for model in MODELS]
    clusters = trained(2, "train_on_cluster", trainings, (0, 1))
    alone = trained(1, "train_virtual_ranks", trainings, False)
    for cluster, found in zip(clusters, alone, strict=True):
        assert cluster.change > 0
        assert torch.dist(found.weights, cluster.weights) < 1e-10 * cluster.change
        assert torch.dist(found.buffers, cluster.buffers) < 1e-10 * cluster.buffers.norm()
