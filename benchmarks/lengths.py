"""How long recipes take on a GPU or one core: the network's forward and backward alone.

Each recipe has a turn for each size of picture that it trains at, one after the other in rounds. On a
CPU, time is that of one thread on its core: what else the machine does stays out. On a GPU, kernels are
launched one by one here; a training that records its step may be quicker than this for small pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from accuracy import refuse_twice
from measure import Work, machine, settle, spread, take_turns
from tables import markdown, shown

from cifar_dist.distributed.launch import init_distributed
from cifar_dist.models.backbones import Classifier, build_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import autocast, check_precision

TRAINING_ROWS = 50_000


def epochs_by_size(recipe: Recipe) -> Counter[int]:
    """{side of the pictures in pixels: how many epochs are trained at it}."""
    return Counter(recipe.model.train_size(epoch) for epoch in range(recipe.run.epochs))


def passes(
    recipe: Recipe, model: Classifier, size: int, device: torch.device, batch_size: int
) -> Work:
    """Forward and backward of one batch of pictures that are `size` px wide."""
    channels = 3, recipe.model.image_size, recipe.model.image_size
    images = torch.zeros(batch_size, *channels, dtype=torch.uint8, device=device)
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
    model = build_model(recipe.model, 100).to(device).to(memory_format=torch.channels_last)
    model.train()
    for size in epochs_by_size(recipe):
        yield f"{recipe.name} {size}", passes(recipe, model, size, device, batch_size)


def duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{shown(seconds / length)} {unit}"
    return f"{shown(seconds)} s"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=50, help="pictures in a forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of a turn, at least")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    device = init_distributed(timeout_seconds=600, threads=1).device
    # Untrained: weights do not change how long a network takes.
    untrained = ["model.pretrained=false"]
    recipes = [load_recipe(path, untrained) for path in options.recipes]
    refuse_twice([recipe.name for recipe in recipes])
    turns = take_turns(
        {
            name: work
            for recipe in recipes
            for name, work in works_of(recipe, device, options.batch)
        },
        rounds=options.rounds,
        seconds=options.seconds,
        settle=lambda: settle(device),
    )
    by = "by_cpu" if device.type == "cpu" else "by_clock"
    rates = {name: spread([getattr(turn, by) for turn in found]) for name, found in turns.items()}
    table, rows = [["recipe", "pictures a second", "epochs", "one training"]], {}
    for recipe in recipes:
        epochs = epochs_by_size(recipe)
        of_size = {size: rates[f"{recipe.name} {size}"] for size in epochs}
        seconds = sum(
            TRAINING_ROWS * count / of_size[size]["median"] for size, count in epochs.items()
        )
        rows[recipe.name] = {
            "precision": recipe.run.precision,
            "epochs": dict(epochs),
            "images_per_second": of_size,
            "seconds": seconds,
        }
        at = ", ".join(
            f"{shown(rate['median'])} at {size} px ({shown(rate['least'])} - {shown(rate['most'])})"
            for size, rate in of_size.items()
        )
        name = f"`{recipe.name}`, {recipe.run.precision}"
        table.append([name, at, str(recipe.run.epochs), duration(seconds)])
    print(markdown(table))
    if options.output:
        content = {"what": "lengths", "machine": machine(), "batch": options.batch, "recipes": rows}
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
