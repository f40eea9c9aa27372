"""How fast pictures come: the data path, the loop around a model that costs nothing, the step.

Everything on one thread of the CPU, side by side with the tutorial's way and the usual ones.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: other work shares the cores

import argparse
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from augmentations import AUGMENTATIONS
from measure import Turns, Work, machine, ratios, spread, take_turns
from ours import BATCH_SIZE, CROP_FLIP, OPTIM, NullModel, our_batches, our_loop, our_step
from peer_loops import accelerate_loop, null_net, timm_loop, tutorial_loop
from peers import (
    Batches,
    endless,
    hugging_face_loader,
    timm_loader,
    torchvision_loader,
    tutorial_loader,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split, load_split, read_digest
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import init_distributed
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD, Preprocess
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.albumentations_workers import albumentations_workers
from cifar_dist.training.objective import Objective
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import write_json

TUTORIAL = "tutorial: Dataset, DataLoader"
TUTORIAL_AUGMENTED = "... one of five by albumentations"
TUTORIAL_HOST: tuple[dict[str, dict[str, Any]], ...] = (
    {
        "OneOf": {
            "transforms": [
                {"ShiftScaleRotate": {}},
                {"CoarseDropout": {}},
                {"ColorJitter": {}},
                {"HorizontalFlip": {}},
                {"VerticalFlip": {}},
            ],
            "p": 1.0,
        }
    },
)
CROP_FLIP_CUTOUT = AugmentConfig(crop_padding=4, hflip=True, cutout=8)


def data_works(split: Split) -> dict[str, Work]:
    """Batches out of the data, no model behind them; a unit is an image."""

    def drawn(batches: Batches) -> Work:
        return lambda: len(next(batches)[1])

    def ours(
        config: AugmentConfig, pixels: Callable[[Tensor], Tensor] = lambda images: images
    ) -> Work:
        batches, augment = our_batches(split), Augment(config, split)
        return lambda: len(pixels(augment(next(batches)[0]).images))

    device = split.labels.device
    normalise = Preprocess(32, mean=CIFAR_MEAN, std=CIFAR_STD).to(device)
    return {
        TUTORIAL: drawn(endless(tutorial_loader(split, BATCH_SIZE))),
        TUTORIAL_AUGMENTED: drawn(endless(tutorial_loader(split, BATCH_SIZE, augment=True))),
        "PIL and torchvision: crop, flip, normalise": drawn(
            endless(torchvision_loader(split, BATCH_SIZE))
        ),
        "timm's loader at its defaults": drawn(
            endless(timm_loader(split, BATCH_SIZE, device, augment=True))
        ),
        "timm's loader, --no-aug": drawn(
            endless(timm_loader(split, BATCH_SIZE, device, augment=False))
        ),
        "Hugging Face Image(), set_transform": drawn(
            endless(hugging_face_loader(split, BATCH_SIZE, augment=False))
        ),
        "... crop, flip, normalise by torchvision": drawn(
            endless(hugging_face_loader(split, BATCH_SIZE, augment=True))
        ),
        "ours": ours(AugmentConfig()),
        "ours, crop and flip": ours(CROP_FLIP),
        "ours, crop, flip and cutout": ours(CROP_FLIP_CUTOUT),
        "ours, crop, flip, float32 and normalised": ours(CROP_FLIP, normalise),
    }


def augmentation_works(split: Split) -> dict[str, Work]:
    """One batch under each augmentation alone, again and again; a unit is an image."""
    batch = gather_batch(split, torch.arange(BATCH_SIZE), epoch=0, micro_batch=0)

    def under(config: AugmentConfig) -> Work:
        augment = Augment(config, split)
        return lambda: len(augment(batch).labels)

    changing = {name: config for name, config in AUGMENTATIONS.items() if config != AugmentConfig()}
    return {name: under(config) for name, config in changing.items()}


def host_rates(split: Split, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The tutorial's OneOf by albumentations, and what is nearest to it on the device, by the clock.

    One after the other, since workers would go on in the turns of others; a unit is an image.
    """
    batch = gather_batch(split, torch.arange(BATCH_SIZE), epoch=0, micro_batch=0)
    config = AugmentConfig(albumentations=TUTORIAL_HOST, workers=2)
    alone, epochs = DistContext(0, 1, None), count()
    inline, device = Augment(config, split), Augment(AUGMENTATIONS["one_of"], split)

    def rate(name: str, work: Work) -> dict[str, Any]:
        (turns,) = take_turns({name: work}, rounds=rounds, seconds=seconds).values()
        return {
            "name": name,
            "images_per_second": spread([turn.by_clock for turn in turns]),
            "images_per_cpu_second": spread([turn.by_cpu for turn in turns]),  # of this process
        }

    with albumentations_workers(config, split, alone, sys.maxsize) as host:
        assert host is not None

        def epoch() -> int:
            host.wait_for_epoch(next(epochs))
            return len(split.labels)

        workers = rate("host, 2 workers", epoch)
    return [
        rate("host, in the process", lambda: len(inline(batch).labels)),
        workers,
        rate("device, one_of", lambda: len(device(batch).labels)),
    ]


def loop_works(split: Split, accelerator: Accelerator) -> dict[str, Work]:
    """Whole training loops around the null model; a unit is an image."""
    device = accelerator.device

    def tutorial(*, augment: bool) -> Work:
        batches = endless(tutorial_loader(split, BATCH_SIZE, augment=augment))
        return tutorial_loop(batches, null_net(device))

    def timm(*, augment: bool) -> Work:
        batches = endless(timm_loader(split, BATCH_SIZE, device, augment=augment))
        return timm_loop(batches, null_net(device))

    def accelerated(*, augment: bool) -> Work:
        loader = accelerator.prepare(hugging_face_loader(split, BATCH_SIZE, augment=augment))
        return accelerate_loop(accelerator, endless(loader), null_net(device))

    def ours(augment: AugmentConfig) -> Work:
        return our_loop(split, NullModel().to(device), accelerator, augment=augment)

    return {
        TUTORIAL: tutorial(augment=False),
        TUTORIAL_AUGMENTED: tutorial(augment=True),
        "timm's loader and step at their defaults": timm(augment=True),
        "timm's loader and step, --no-aug": timm(augment=False),
        "Accelerate, Image() and set_transform": accelerated(augment=False),
        "... crop, flip, normalise by torchvision": accelerated(augment=True),
        "ours": ours(AugmentConfig()),
        "ours, crop and flip": ours(CROP_FLIP),
        "ours, one of five, on the device": ours(AUGMENTATIONS["one_of"]),
    }


def step_works(split: Split, accelerator: Accelerator) -> dict[str, Work]:
    """One batch in two micro-batches, again and again: our step, and its operations in plain torch."""
    micro_batches = next(our_batches(split, micro_batches=2))
    model, twin = NullModel(), NullModel()
    optimizer = build_optimizer(OPTIM, model)
    objective = Objective(Augment(AugmentConfig(), split), {"cross_entropy": CrossEntropy()})
    update = our_step(model, objective, optimizer, accelerator, micro_batches=2)

    parameters = list(twin.parameters())
    plain_optimizer = torch.optim.AdamW(parameters, lr=OPTIM.lr, weight_decay=0.001, fused=True)

    def ours() -> int:
        update(micro_batches, step=0)
        return 1

    def by_hand() -> int:
        for micro_batch in micro_batches:
            outputs = twin(micro_batch.images)
            loss = F.cross_entropy(outputs.logits, micro_batch.labels, reduction="none")
            100.0 * (outputs.logits.detach().argmax(1) == micro_batch.labels)
            (loss.sum() / BATCH_SIZE).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 5.0)
        plain_optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        return 1

    return {"by hand": by_hand, "ours": ours}


def compare(works: dict[str, Work], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Images a second of each, and how many times the tutorial's that is."""
    turns = take_turns(works, rounds=rounds, seconds=seconds)
    return [
        {
            "name": name,
            "images_per_second": spread([turn.by_clock for turn in turns[name]]),
            "images_per_cpu_second": spread([turn.by_cpu for turn in turns[name]]),
            "times_the_tutorial": ratios(turns, name, TUTORIAL),
        }
        for name in works
    ]


def speeds(works: dict[str, Work], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Images a second of each."""
    turns = take_turns(works, rounds=rounds, seconds=seconds)
    return [
        {
            "name": name,
            "images_per_second": spread([turn.by_clock for turn in turns[name]]),
            "images_per_cpu_second": spread([turn.by_cpu for turn in turns[name]]),
        }
        for name in works
    ]


def overhead(turns: Turns) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU a step, and what ours takes more than its operations do by hand."""
    cost = {name: [1000 / turn.by_cpu for turn in turns[name]] for name in turns}
    more = [ours - plain for ours, plain in zip(cost["ours"], cost["by hand"], strict=True)]
    return {"by hand": spread(cost["by hand"]), "ours": spread(cost["ours"]), "more": spread(more)}


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """One line a row: images/s by the clock with spread, by CPU time, times the tutorial's."""
    lines = [
        f"{title:<42}{'images/s':>12}{'least - most':>24}{'a CPU s':>12}{'x CPU':>8}{'x clock':>9}"
    ]
    for row in rows:
        clock, cpu, times = (
            row[name]
            for name in ("images_per_second", "images_per_cpu_second", "times_the_tutorial")
        )
        span = f"{clock['least']:,.0f} - {clock['most']:,.0f}"
        lines.append(
            f"{row['name']:<42}{clock['median']:>12,.0f}{span:>24}{cpu['median']:>12,.0f}"
            f"{times['by_cpu']['median']:>8.2f}{times['by_clock']['median']:>9.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/input.py",
        description="Measure the data path, the loop and the step on one CPU thread: 5 minutes.",
    )
    parser.add_argument("--data", type=Path, default=Path("data/sample"), help="prepared data")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each row (default: 7)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds a turn (default: 0.5)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError("--rounds and --seconds: give numbers above 0")
    split = load_split(options.data, "train")
    if len(split.labels) < BATCH_SIZE:
        raise UserError(f"{options.data} has fewer than {BATCH_SIZE} training rows")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = init_distributed(timeout_seconds=600, threads=1)

    content = {"what": "input", **machine(), "data": read_digest(options.data)["content"]}
    content |= {
        "rows": len(split.labels),
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    turn = {"rounds": options.rounds, "seconds": options.seconds}
    content["data_path"] = compare(data_works(split), **turn)
    content["augmentations"] = speeds(augmentation_works(split), **turn)
    content["host_augmentation"] = host_rates(split, **turn)
    content["null_model_loop"] = compare(loop_works(split, accelerator), **turn)
    content["step_milliseconds"] = overhead(take_turns(step_works(split, accelerator), **turn))
    print(
        f"{content['hardware']}, {content['threads']} thread of {content['cores']} cores, torch "
        f"{content['torch']}, {content['date']}, commit {content['commit']}, batch {BATCH_SIZE}, "
        f"{options.rounds} rounds\n"
    )
    print(table("data path", content["data_path"]), end="\n\n")
    for row in content["augmentations"]:
        clock, cpu = row["images_per_second"], row["images_per_cpu_second"]
        print(
            f"augmentation, {row['name']:<20}{clock['median']:>10,.0f} images/s by the clock, "
            f"{cpu['median']:>10,.0f} a CPU s ({cpu['least']:,.0f} - {cpu['most']:,.0f})"
        )
    for row in content["host_augmentation"]:
        clock = row["images_per_second"]
        print(
            f"augmentation, {row['name']:<20}{clock['median']:>10,.0f} images/s by the clock "
            f"({clock['least']:,.0f} - {clock['most']:,.0f})"
        )
    print()
    print(table("whole loop, null model", content["null_model_loop"]), end="\n\n")
    for name, cost in content["step_milliseconds"].items():
        print(
            f"step, two micro-batches, {name:<8}{cost['median']:8.3f} ms of CPU "
            f"({cost['least']:.3f} - {cost['most']:.3f})"
        )
    if options.output:
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
