"""Time the first steps of a recipe: `train --dry-run --time`."""

from __future__ import annotations

import signal
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace

import torch

from cifar_dist.distributed import signals
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.session import distributed_session
from cifar_dist.tracking.tracker import TrackingConfig
from cifar_dist.training.loop import images_ready, train_one_step
from cifar_dist.training.setup import setup


def time_training(recipe: Recipe) -> float:
    """Train the first steps in a temporary folder and return the steps per second.

    Evaluations are not included.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed_session(recipe) as accelerator,
        ExitStack() as stack,
    ):
        run_config = replace(recipe.run, output_dir=folder)
        recipe = replace(recipe, run=run_config, tracking=TrackingConfig(mode="off"))
        run, state = setup(recipe, accelerator, stack)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # there is nothing to save
        speed = None
        while speed is None and state.step < run.total_steps:
            if signals.stop_signal():
                raise KeyboardInterrupt
            if not images_ready(run, state, polled=True):
                continue
            train_one_step(run, state)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            now = time.monotonic()
            speed = run.context.run_on_main(state.pace.steps_per_second, state.step, now)
        return speed or state.step / state.seconds
