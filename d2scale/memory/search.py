"""Finding the most images that fit, in few trials. Numbers in, numbers out; no torch."""

from __future__ import annotations

from math import ceil

MAX_TRIALS = 4
# How far one trial goes beyond another that fitted or failed, as a part of the images.
_STRIDE = 0.02


class SizeSearch:
    """Narrows down the most images per GPU that fit.

    Begins at a prediction and goes on in small strides, so a good prediction is confirmed with
    one size that fits and the next that does not. After ``MAX_TRIALS`` sizes the largest that
    fitted is the answer; only if none has, the search goes on.

    Args:
        guess: the predicted most.
        limit: no more than this are wanted; 0: no limit.

    Attributes:
        largest: the most images that were seen to fit; 0: none was.
    """

    def __init__(self, guess: int, limit: int = 0) -> None:
        self.largest = 0
        self.trials = 0
        self._limit = limit
        self._failed: int | None = None
        self._stride = 0
        self._guess = self._clip(guess)

    def next_size(self) -> int | None:
        """Return the images to try next; None when the answer is known or the trials are over."""
        if self._failed == self.largest + 1 or (self.trials >= MAX_TRIALS and self.largest):
            return None
        if self._limit and self.largest == self._limit:
            return None
        return self._guess

    def record(self, size: int, fits: bool, expected: int = 0) -> None:
        """Tell the outcome of a trial.

        Args:
            size: what was tried.
            fits: whether it fitted.
            expected: the most that should fit after what this trial has taken, if it fitted.
        """
        self.trials += 1
        if fits:
            self.largest = max(self.largest, size)
        else:
            self._failed = size if self._failed is None else min(self._failed, size)
        self._stride = max(2 * self._stride, ceil(_STRIDE * size), 1)
        if fits and expected > size:
            self._guess = expected if self._failed else max(size + self._stride, expected)
        elif self.largest and self._failed is not None:
            self._guess = (self.largest + self._failed) // 2
        elif fits:
            self._guess = size + self._stride
        elif self.trials < MAX_TRIALS - 1:
            self._guess = size - self._stride
        else:
            self._guess = size // 2  # the prediction is far off
        self._guess = self._clip(self._guess)

    @property
    def found_border(self) -> bool:
        """Whether one image more was seen to fail."""
        return self._failed == self.largest + 1

    def _clip(self, size: int) -> int:
        low = self.largest + 1
        high = self._failed - 1 if self._failed is not None else max(size, low)
        if self._limit:
            high = min(high, self._limit)
        return max(low, min(size, high))
