"""The speed of a training, measured at its first steps."""

from __future__ import annotations

WARM_UP_SECONDS, MEASURE_SECONDS = 3.0, 5.0
MIN_STEPS = 3  # of each part; with CUDA graphs the first steps capture


class Pace:
    """Measure the speed of this process's first steps, without the very first ones."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None  # (step, time) at the first call
        self.warm: tuple[int, float] | None = None  # (step, time) after the warm-up
        self.done = False

    def steps_per_second(self, step: int, now: float) -> float | None:
        """Return the speed once, at the first call at which it is known; otherwise None.

        `step` is the number of completed updates and `now` a monotonic time in seconds.
        """
        if self.done:
            return None
        if self.first is None:
            self.first = step, now
        elif self.warm is None:
            if step - self.first[0] >= MIN_STEPS and now - self.first[1] >= WARM_UP_SECONDS:
                self.warm = step, now
        elif step - self.warm[0] >= MIN_STEPS and now - self.warm[1] >= MEASURE_SECONDS:
            self.done = True
            return (step - self.warm[0]) / (now - self.warm[1])
        return None
