"""Kill training processes and start them again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import Launch, train

from cifar_dist.run_folder.checkpoint import checkpoints

EVERY_STEP = (
    1e-9  # run.save_every_minutes: saves at every poll, which a single process does each step
)


def wait_for_step(ranks: Launch, run: Path, step: int) -> None:
    """Wait until the run has a checkpoint of `step` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saved = checkpoints(run / "checkpoints")
        if saved and int(saved[0].name.removeprefix("step_")) >= step:
            return
        assert all(process.is_alive() for process in ranks.processes), ranks.output
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {step}:\n{ranks.output}")


def kill_and_resume(
    path: Path, cwd: Path, steps: list[int], *, last_step: int, world_sizes: Sequence[int] = (1,)
) -> None:
    """Kill all ranks with SIGKILL after each of `steps`, then finish the run, runs/killed.

    Each start takes the next one of `world_sizes`, in a circle.
    """
    arguments = [path, "name=killed", f"run.save_every_minutes={EVERY_STEP}"]
    run, sizes = cwd / "runs/killed", itertools.cycle(world_sizes)
    for step in steps:
        ranks = Launch("train", arguments, cwd=cwd, world_size=next(sizes))
        wait_for_step(ranks, run, step)
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
    output = train(*arguments, cwd=cwd, world_size=next(sizes))
    assert f"of {last_step}" in output
