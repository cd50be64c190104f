"""TRL 0.11's length sampler."""

import numpy as np


class LengthSampler:
    """Draws lengths uniformly from a HALF-OPEN range, by numpy's global generator: (2, 8) never gives 8."""

    def __init__(self, min_value: int, max_value: int) -> None:
        """Draw from min_value, ..., max_value - 1.

        Raises:
            ValueError: the range is empty.
        """
        if max_value <= min_value:
            raise ValueError(
                f"LengthSampler({min_value}, {max_value}) has nothing to draw: the range is half-open, "
                "max_value itself is never drawn; give a larger one"
            )
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """Draw a length."""
        return int(np.random.choice(self.values))
