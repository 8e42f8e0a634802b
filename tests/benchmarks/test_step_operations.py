"""What the host does for a step on a GPU, counted on fake tensors of a device that is not here."""

from __future__ import annotations

import pytest
import step_operations
import torch

from d2scale.step.private_torch import FakeTensorMode

NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
)


def moves_fake_tensors():
    """Whether this version of torch moves a fake tensor to a GPU without a driver."""
    work = step_operations.HostWork()
    with FakeTensorMode(), step_operations.gpu_that_is_not_there(work):
        try:
            torch.zeros(1).to("cuda", non_blocking=True)
        except RuntimeError:
            return False
    return True


@pytest.mark.skipif(
    not moves_fake_tensors(), reason="this torch asks for a driver to move a fake tensor to a GPU"
)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_host_waits_once_a_step_and_works_little_for_an_image_more(precision):
    few, many = (step_operations.count(precision, images, NARROW) for images in (2, 6))
    # The losses, before the update, and at the same moment the scale.
    assert few["waits"] == many["waits"] == {"float32": 1, "float16": 2}[precision]
    names = ("operations of the forward", "of the rest")
    more = sum(many[name] - few[name] for name in names)
    assert 0 < more <= 10 * (6 - 2)
