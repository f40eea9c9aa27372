"""Stop and kill training processes, and start them again."""

from __future__ import annotations

import time
from pathlib import Path

from launcher import Ranks, train

from cifar_dist.run_folder.checkpoint import (
    checkpoints,
)

EVERY_STEP = 1e-9  # minutes between saves: one at every vote, which one process holds every step


def wait_for_step(ranks: Ranks, run: Path, step: int) -> None:
    """Until the run has a checkpoint of `step` or later; other work may make that slow."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = checkpoints(run / "checkpoints")
        if found and int(found[0].name.removeprefix("step_")) >= step:
            return
        assert all(process.is_alive() for process in ranks.processes), ranks.output
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {step}:\n{ranks.output}")


def kill_and_go_on(
    path: Path, cwd: Path, steps: list[int], *, last_step: int, world_size: int = 1
) -> None:
    """kill -9 all ranks once the run is past each of `steps`, and start it again; then finish it."""
    arguments = [path, "name=killed", f"run.save_every_minutes={EVERY_STEP}"]
    run = cwd / "runs/killed"
    for step in steps:
        ranks = Ranks("train", arguments, cwd=cwd, world_size=world_size)
        wait_for_step(ranks, run, step)
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
    output = train(*arguments, cwd=cwd, world_size=world_size)
    assert f"of {last_step}" in output
