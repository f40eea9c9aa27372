"""Estimate the training time of recipes from the forward and backward pass of their networks.

Every image size that a recipe trains at is one row. On a CPU, times are CPU times of one thread. On a
GPU, kernels are launched eagerly; training with CUDA graphs may be faster for small images.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from accuracy import check_unique
from measure import Work, machine, median_range, synchronize, take_turns
from tables import format_number, format_range, markdown

from cifar_dist.distributed.launch import init_distributed
from cifar_dist.models.classifier import Classifier, build_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.session import with_precision
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import auto_precision, autocast, check_precision

TRAINING_ROWS = 50_000


def epochs_by_size(recipe: Recipe) -> Counter[int]:
    """Return {image size in pixels: number of epochs}."""
    return Counter(recipe.model.train_size(epoch) for epoch in range(recipe.run.epochs))


def passes(
    recipe: Recipe, model: Classifier, size: int, device: torch.device, batch_size: int
) -> Work:
    """Return the forward and backward pass of one batch of images of `size` px."""
    shape = 3, recipe.model.image_size, recipe.model.image_size
    images = torch.zeros(batch_size, *shape, dtype=torch.uint8, device=device)
    labels = torch.arange(batch_size, device=device) % 100

    def work() -> int:
        model.train_size = size
        with autocast(recipe.run.precision, device):
            outputs = model(images)
        torch.nn.functional.cross_entropy(outputs.logits.float(), labels).backward()
        model.zero_grad()
        return batch_size

    return work


def works_of(recipe: Recipe, device: torch.device, batch_size: int) -> Iterator[tuple[str, Work]]:
    check_precision(recipe.run.precision, device)
    if recipe.run.precision == "auto":
        recipe = with_precision(recipe, auto_precision(device))
    model = build_model(recipe.model, 100).to(device).to(memory_format=torch.channels_last)
    model.train()
    for size in epochs_by_size(recipe):
        yield f"{recipe.name} {size}", passes(recipe, model, size, device, batch_size)


def duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{format_number(seconds / length)} {unit}"
    return f"{format_number(seconds)} s"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=50, help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="minimum length of a turn")
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    options = parser.parse_args(arguments)
    device = init_distributed(timeout_seconds=600, threads=1).device
    untrained = ["model.pretrained=false"]  # the time does not depend on the weights
    recipes = [load_recipe(path, untrained) for path in options.recipes]
    check_unique([recipe.name for recipe in recipes])
    turns = take_turns(
        {
            name: work
            for recipe in recipes
            for name, work in works_of(recipe, device, options.batch)
        },
        rounds=options.rounds,
        seconds=options.seconds,
        sync=lambda: synchronize(device),
    )
    by = "by_cpu" if device.type == "cpu" else "by_clock"
    rates = {name: median_range([getattr(turn, by) for turn in row]) for name, row in turns.items()}
    table, rows = [["recipe", "images/s", "epochs", "one training"]], {}
    for recipe in recipes:
        epochs = epochs_by_size(recipe)
        rate_at = {size: rates[f"{recipe.name} {size}"] for size in epochs}
        seconds = sum(
            TRAINING_ROWS * count / rate_at[size]["median"] for size, count in epochs.items()
        )
        rows[recipe.name] = {
            "precision": recipe.run.precision,
            "epochs": dict(epochs),
            "images_per_second": rate_at,
            "seconds": seconds,
        }
        speed = ", ".join(f"{format_range(rate)} at {size} px" for size, rate in rate_at.items())
        name = f"`{recipe.name}`, {recipe.run.precision}"
        table.append([name, speed, str(recipe.run.epochs), duration(seconds)])
    print(markdown(table))
    if options.output:
        content = {"what": "lengths", "machine": machine(), "batch": options.batch, "recipes": rows}
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
