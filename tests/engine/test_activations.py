import pytest
import torch
from torch import nn

from d2scale.config import load_cfg
from d2scale.engine.activations import apply_activation_checkpointing
from d2scale.engine.models import new_model
from d2scale.errors import ConfigError
from d2scale.memory.tracker import StorageTracker
from d2scale.memory.worst_case import WorstCase

NARROW = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
)
BATCH = WorstCase(((96, 160),), 3, "a test").samples(2)


def step(checkpointing, norm, precision=None):
    opts = (*NARROW, "MODEL.RESNETS.NORM", norm)
    switch = ("D2SCALE.ACTIVATION_CHECKPOINTING", str(checkpointing))
    cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", [*opts, *switch])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_model(cfg).train()
    tracker = StorageTracker()
    with tracker, torch.autocast("cpu", precision, enabled=precision is not None):
        normalizers = model.finish_normalizers(model.loss_normalizers(BATCH), 1)
        losses = model(BATCH, normalizers=normalizers)
        kept = tracker.live_bytes
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, kept


@pytest.mark.parametrize(
    ("norm", "precision"), [("GN", None), ("FrozenBN", None), ("GN", torch.bfloat16)]
)
def test_losses_and_gradients_stay_and_fewer_activations_are_kept(norm, precision):
    losses, gradients, kept = step(False, norm, precision)
    losses_again, gradients_again, kept_again = step(True, norm, precision)
    assert kept_again < 0.9 * kept
    torch.testing.assert_close(losses_again, losses, rtol=0, atol=0)
    assert gradients.keys() == gradients_again.keys()
    torch.testing.assert_close(gradients_again, gradients, rtol=0, atol=0)


def test_a_model_that_does_not_offer_it_is_named():
    with pytest.raises(ConfigError, match=r"ACTIVATION_CHECKPOINTING is True.*Linear"):
        apply_activation_checkpointing(nn.Linear(1, 1))
