"""Random numbers that depend on a key alone, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_stream(seed: int, *key: int, on_device: bool = True) -> Iterator[None]:
    """Within the context, let torch, NumPy and Python draw from the streams of a key.

    Their generators are as before at its end. Without ``on_device`` torch's generator is that of
    the CPU alone, and no device is touched.
    """
    words = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(8)
    has_device = on_device and torch.cuda.is_initialized()
    seed_torch = torch.manual_seed if on_device else torch.default_generator.manual_seed
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if has_device else []):
        random.seed(words.tobytes())
        np.random.seed(words)
        seed_torch(int(words[0]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
