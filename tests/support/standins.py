"""A tiny detector-like model and its samples, importable in spawned ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2scale.step.out_of_memory import OutOfMemoryError


def make_samples(count: int, seed: int = 0) -> list[dict]:
    """Images of two sizes with 0 to 3 boxes."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        height, width = (12, 16) if index % 2 else (16, 12)
        boxes = int(torch.randint(0, 4, (), generator=generator))
        samples.append(
            {
                "image": torch.randint(0, 256, (3, height, width), generator=generator).byte(),
                "height": height,
                "width": width,
                "image_id": index,
                "file_name": f"{index}.jpg",
                "boxes": torch.tensor([[1.0, 1.0, 6.0, 8.0]]).repeat(boxes, 1),
                "classes": torch.zeros(boxes, dtype=torch.int64),
            }
        )
    return samples


class StandIn(nn.Module):
    """Losses that are sums over images, divided by a count that needs all ground truth."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 4, 3, padding=1, dtype=dtype)
            self.norm = nn.GroupNorm(2, 4, dtype=dtype)
            self.score = nn.Linear(4, 1, dtype=dtype)
            self.size = nn.Linear(4, 1, dtype=dtype)

    def loss_normalizers(self, samples) -> dict[str, Tensor]:
        count = sum(len(sample["boxes"]) for sample in samples)
        area = sum(float(sample["boxes"].sum()) for sample in samples)
        return {
            "positives": torch.tensor(count, dtype=torch.float64),
            "area": torch.tensor(area, dtype=torch.float64),
        }

    def finish_normalizers(self, totals, world_size) -> dict[str, Tensor]:
        return {name: total.clamp(min=1.0) / world_size for name, total in totals.items()}

    def features(self, sample) -> Tensor:
        weight = self.stem.weight
        image = sample["image"].to(weight.device, weight.dtype) / 255
        return self.norm(self.stem(image[None])).relu().mean((2, 3))[0]

    def forward(self, samples, normalizers=None):
        if not self.training:
            return [self.detect(sample) for sample in samples]
        if normalizers is None:
            normalizers = self.finish_normalizers(self.loss_normalizers(samples), 1)
        score = size = self.stem.weight.new_zeros(())
        for sample in samples:
            features = self.features(sample)
            boxes = len(sample["boxes"])
            score = score + nn.functional.softplus(self.score(features)).sum() * (1 + boxes)
            size = size + (self.size(features).sum() - boxes) ** 2 * sample["boxes"].sum()
        return {
            "loss_cls": score / normalizers["positives"].to(score),
            "loss_loc": size / normalizers["area"].to(size),
        }

    def detect(self, sample):
        score = self.score(self.features(sample)).sigmoid()
        return {
            "boxes": torch.tensor([[1.0, 1.0, 6.0, 8.0]]),
            "scores": score,
            "classes": torch.zeros(1, dtype=torch.int64),
        }


class PlainStandIn(nn.Module):
    """A model without the protocol: the mean over its images of a loss of each."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = StandIn(dtype)
        self.inner.size.requires_grad_(False)

    def forward(self, samples):
        losses = [self.inner.score(self.inner.features(sample)).sum() ** 2 for sample in samples]
        return {"loss": torch.stack(losses).mean()}


class FailingOptimizer(torch.optim.SGD):
    """Updates some weights, then runs out of memory, when ``fail`` says so."""

    fail = staticmethod(lambda: False)

    def step(self, closure=None):
        if self.fail():
            # Momentum comes into being for the first of the parameters alone.
            parameter = self.param_groups[0]["params"][0]
            with torch.no_grad():
                parameter.add_(1.0)
            self.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
            raise out_of_memory()
        return super().step(closure)


def out_of_memory() -> RuntimeError:
    return OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nMore lines.")


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise out_of_memory()


class FailingStandIn(StandIn):
    """Fails where ``fail(part, images)`` says so; draws by chance and keeps statistics."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.fail = lambda part, images: False
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def loss_normalizers(self, samples):
        if self.fail("normalizers", len(samples)):
            raise out_of_memory()
        return super().loss_normalizers(samples)

    def forward(self, samples, normalizers=None):
        self.forwards += len(samples)
        if not hasattr(self, "moving"):
            self.register_buffer("moving", torch.zeros(()), persistent=False)
        self.moving += len(samples)
        losses = super().forward(samples, normalizers)
        if self.fail("forward", len(samples)):
            raise out_of_memory()
        if self.fail("backward", len(samples)):
            losses["loss_cls"] = _FailingBackward.apply(losses["loss_cls"])
        return losses
