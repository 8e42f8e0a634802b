"""A search for the most images that fit, in few trials. Numbers in, numbers out; no torch."""

from __future__ import annotations

from math import ceil

MAX_TRIALS = 4
# How far a size lies above those that all fitted, and below those that all failed, as parts of the
# images. A prediction that is right is confirmed with two sizes. From one that is up to 10 per cent
# off, MAX_TRIALS sizes lead to 97 per cent of the most that fit, up to 300 images at least.
_UP = (0.02, 0.06)
_DOWN = 0.06


class SizeSearch:
    """Searches for the most images per GPU that fit.

    It begins at a prediction, goes up or down until one size fits and another does not, and
    bisects the rest. The memory that a trial took corrects the prediction. After ``MAX_TRIALS``
    sizes the largest that fitted is the answer; only if none did, the search goes on.

    Args:
        guess: the predicted most.
        limit: no more than this are wanted; 0: no limit.

    Attributes:
        largest: the most images that fitted so far; 0: none did.
    """

    def __init__(self, guess: int, limit: int = 0) -> None:
        self.largest = 0
        self.trials = 0
        self._limit = limit
        self._failed: int | None = None
        self._expected = 0
        self._guess = self._clip(guess)

    def next_size(self) -> int | None:
        """Return the images to try next; None when the answer is known or the trials are over."""
        if self._failed == self.largest + 1 or (self.trials >= MAX_TRIALS and self.largest):
            return None
        if self._limit and self.largest == self._limit:
            return None
        return self._guess

    def record(self, size: int, fits: bool, expected: int = 0) -> None:
        """Record the outcome of a trial.

        Args:
            size: its images.
            fits: whether it fitted.
            expected: the most that should fit by the memory that this trial took, if it fitted.
        """
        self.trials += 1
        if fits:
            self.largest = max(self.largest, size)
        else:
            self._failed = size if self._failed is None else min(self._failed, size)
        self._expected = expected if fits else self._expected
        self._guess = self._clip(self._next_guess(size))

    def _next_guess(self, size: int) -> int:
        """The next size, before it is clipped to those that are open."""
        if self._failed is None:
            stride = _UP[min(self.trials, len(_UP)) - 1]
            return max(self._expected, size + ceil(stride * size))
        if not self.largest:
            if self.trials < MAX_TRIALS - 1:
                return size - max(1, round(_DOWN * size))
            return size // 2  # the prediction is far off
        below = min(self._expected, self._failed - max(1, round(_DOWN * self._failed)))
        return below if below > self.largest else (self.largest + self._failed) // 2

    def _clip(self, size: int) -> int:
        low = self.largest + 1
        high = self._failed - 1 if self._failed is not None else max(size, low)
        if self._limit:
            high = min(high, self._limit)
        return max(low, min(size, high))
