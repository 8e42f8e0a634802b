"""Micro-batches of a virtual rank of RetinaNet and FCOS are its one forward."""

import copy
from itertools import islice

import pytest
import torch
from upstream_in_float64 import losses_in_float64

import dense_detectors
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.virtual_ranks import VirtualRanks

SPLITS = [(1, 3), (1, 1, 1, 1)]


@pytest.fixture(params=["retinanet", "fcos"])
def model(request):
    torch.manual_seed(0)
    with losses_in_float64():
        yield getattr(dense_detectors, request.param)().double().train()


@pytest.fixture(autouse=True)
def storage():
    from detectron2.utils.events import EventStorage

    with EventStorage():
        yield


def result(model, losses):
    """Losses and gradients, which are then forgotten."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}, gradients


def in_one(model, batch):
    losses = model(batch)
    sum(losses.values()).backward()
    return result(model, losses)


def in_parts(split_model, model, batch, sizes):
    """What the step does with the micro-batches of a virtual rank."""
    samples = iter(batch)
    parts = [list(islice(samples, size)) for size in sizes]
    split_model.loss_normalizers(batch[:1])  # as an attempt has left it that failed then
    with torch.no_grad():
        counts = [split_model.loss_normalizers(part) for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    normalizers = split_model.finish_normalizers(totals, 1)
    sums = {}
    for part in parts:
        losses = split_model(part, normalizers=normalizers)
        sum(losses.values()).backward()
        sums = {name: sums.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
    return result(model, sums)


@pytest.mark.parametrize("sizes", SPLITS)
def test_parts_are_one_forward(model, sizes):
    from d2scale.detectron2.dense_detectors import split_model

    split = split_model(model)
    batches = [dense_detectors.samples(4, seed) for seed in range(2)]
    expected = [in_one(model, batch) for batch in batches]
    average = model.loss_normalizer
    del model.loss_normalizer
    names = set(vars(model))
    for batch, (losses, gradients) in zip(batches, expected, strict=True):
        own_losses, own_gradients = in_parts(split, model, batch, sizes)
        assert own_losses == pytest.approx(losses, rel=1e-10)
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        own = torch.cat([gradient.flatten() for gradient in own_gradients])
        assert torch.dist(own, whole) < 1e-10 * whole.norm()
    assert model.loss_normalizer == average
    assert set(vars(model)) - names == {"loss_normalizer"}


def test_plain_parts_are_another_training(model):
    batch = dense_detectors.samples(4)
    whole, _ = in_one(model, batch)
    del model.loss_normalizer
    parts = [in_one(model, batch[:2])[0], in_one(model, batch[2:])[0]]
    for name, loss in whole.items():
        assert abs(sum(part[name] for part in parts) / 2 - loss) > 0.01 * loss


def test_images_without_objects_divide_by_one_positive(model):
    from d2scale.detectron2.dense_detectors import split_model

    batch = [dense_detectors.samples(3)[2]] * 2
    assert not len(batch[0]["instances"])
    losses, _ = in_one(model, batch)
    average = model.loss_normalizer
    del model.loss_normalizer
    assert in_parts(split_model(model), model, batch, (1, 1))[0] == pytest.approx(losses, rel=1e-10)
    assert model.loss_normalizer == average


def test_a_failed_forward_leaves_the_models_own_methods(model):
    from d2scale.detectron2.dense_detectors import split_model

    split = split_model(model)
    before = set(vars(model))
    batch = dense_detectors.samples(1)
    normalizers = split.finish_normalizers(split.loss_normalizers(batch), 1)
    with pytest.raises(KeyError):
        split([{}], normalizers=normalizers)
    assert set(vars(model)) == before


def test_subclasses_and_other_models_have_losses_of_their_own(model):
    from d2scale.detectron2.dense_detectors import split_model

    class Own(type(model)):
        pass

    model.__class__ = Own
    assert split_model(model) is None
    assert split_model(torch.nn.Linear(1, 1)) is None


def test_the_step_splits_virtual_ranks_exactly(model):
    """Weights after steps of two virtual ranks of four images, two images at a time."""
    from d2scale.detectron2.dense_detectors import split_model

    started = copy.deepcopy(model.state_dict())
    weights = []
    for ims_per_gpu in (4, 2):
        model.load_state_dict(started)
        vars(model).pop("loss_normalizer", None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        virtual_ranks = VirtualRanks(model, 2, seed=0)
        options = StepOptions(virtual_ranks=virtual_ranks, split_model=split_model(model))
        step = OptimizerStep(model, optimizer, ims_per_gpu=ims_per_gpu, options=options)
        for number in range(2):
            step(dense_detectors.samples(8, number), number=number)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    start = torch.cat([started[name].flatten() for name, _ in model.named_parameters()])
    assert torch.dist(*weights) < 1e-10 * torch.dist(weights[0], start)
