"""Floor 5. What `train --dry-run` prints: a recipe with its defaults, and what it will cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_dist.data.arrow import read_digest
from cifar_dist.engine.estimate import estimate, optimizer_states, readable
from cifar_dist.nets.backbones import build_model
from cifar_dist.recipe import Recipe, to_yaml


def plan(recipe: Recipe) -> str:
    """The resolved recipe, parameters, FLOPs, steps, memory, run folder; computes nothing."""
    run, data = recipe.run, Path(recipe.data.path)
    shards = run.shards or 1
    passes = 2 if recipe.optim.sam else 1
    # SAM keeps the weights, and has its first gradient beside the second's.
    states = optimizer_states(recipe.optim) + 2 * (passes - 1)
    # Shapes only, so the largest model costs nothing: it is built on the meta device, where timm may
    # read the few numbers that it needs, then pretends to be on the CPU, where autocast works.
    with torch.device("meta"):
        model = build_model(replace(recipe.model, pretrained=False, weights=None), 100)
    with FakeTensorMode(allow_non_fake_inputs=True):
        numbers = estimate(
            model.to_empty(device="cpu"),
            batch_size=run.batch_size,
            shards=shards,
            states=states,
            ema=recipe.ema is not None,
            half=run.precision != "fp32",
        )
    place = " on the host" if recipe.data.place == "host" else ""
    rows = read_digest(data)["train"]["rows"] if (data / "digest.json").exists() else 50_000
    steps = (rows - recipe.data.holdout) // run.batch_size
    forward = numbers["forward_flops_per_image"]
    # The backward costs two forwards.
    training = 3 * passes * forward * steps * run.batch_size * run.epochs
    return (
        f"{to_yaml(recipe)}\n"
        f"parameters        {numbers['parameters']:,}\n"
        f"FLOPs an image    {readable(forward)} forward, {readable(training)} in the whole training\n"
        f"steps             {run.epochs} epochs of {steps} = {run.epochs * steps:,}\n"
        f"memory a process  at least {numbers['memory_bytes'] / 2**30:.2f} GiB "
        f"({-(-run.batch_size // shards)} rows a shard), and {rows * 3092 / 2**30:.2f} GiB of data{place}\n"
        f"run folder        {recipe.folder}"
    )
