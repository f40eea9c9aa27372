"""Measure the data path, training loops around a null model, and the step, on one CPU thread.

Ours is compared with the tutorial's code and with common libraries.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the cores may be shared

import argparse
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from augmentations import AUGMENTATIONS
from measure import Turns, Work, machine, median_range, ratios, take_turns
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
    """Return work that loads batches, without a model; the unit is an image."""

    def load(batches: Batches) -> Work:
        return lambda: len(next(batches)[1])

    def ours(
        config: AugmentConfig, pixels: Callable[[Tensor], Tensor] = lambda images: images
    ) -> Work:
        batches, augment = our_batches(split), Augment(config, split)
        return lambda: len(pixels(augment(next(batches)[0]).images))

    device = split.labels.device
    normalize = Preprocess(32, mean=CIFAR_MEAN, std=CIFAR_STD).to(device)
    return {
        TUTORIAL: load(endless(tutorial_loader(split, BATCH_SIZE))),
        TUTORIAL_AUGMENTED: load(endless(tutorial_loader(split, BATCH_SIZE, augment=True))),
        "PIL and torchvision: crop, flip, normalize": load(
            endless(torchvision_loader(split, BATCH_SIZE))
        ),
        "timm's loader at its defaults": load(
            endless(timm_loader(split, BATCH_SIZE, device, augment=True))
        ),
        "timm's loader, --no-aug": load(
            endless(timm_loader(split, BATCH_SIZE, device, augment=False))
        ),
        "Hugging Face Image(), set_transform": load(
            endless(hugging_face_loader(split, BATCH_SIZE, augment=False))
        ),
        "... crop, flip, normalize by torchvision": load(
            endless(hugging_face_loader(split, BATCH_SIZE, augment=True))
        ),
        "ours": ours(AugmentConfig()),
        "ours, crop and flip": ours(CROP_FLIP),
        "ours, crop, flip and cutout": ours(CROP_FLIP_CUTOUT),
        "ours, crop, flip, float32 and normalized": ours(CROP_FLIP, normalize),
    }


def augmentation_works(split: Split) -> dict[str, Work]:
    """Return work that augments the same batch, one per augmentation; the unit is an image."""
    batch = gather_batch(split, torch.arange(BATCH_SIZE), epoch=0, micro_batch=0)

    def augment_with(config: AugmentConfig) -> Work:
        augment = Augment(config, split)
        return lambda: len(augment(batch).labels)

    return {
        name: augment_with(config)
        for name, config in AUGMENTATIONS.items()
        if config != AugmentConfig()
    }


def host_rates(split: Split, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Compare the tutorial's OneOf (albumentations) with the closest operations on the device.

    Rows run one after the other, because the workers would run during the turns of other rows.
    """
    batch = gather_batch(split, torch.arange(BATCH_SIZE), epoch=0, micro_batch=0)
    config = AugmentConfig(albumentations=TUTORIAL_HOST, workers=2)
    context, epochs = DistContext(0, 1, None), count()
    inline, device = Augment(config, split), Augment(AUGMENTATIONS["one_of"], split)

    def rate(name: str, work: Work) -> dict[str, Any]:
        (row,) = speeds({name: work}, rounds, seconds)
        return row

    with albumentations_workers(config, split, context, sys.maxsize) as pool:
        assert pool is not None

        def epoch() -> int:
            pool.wait_for_epoch(next(epochs))
            return len(split.labels)

        workers = rate("albumentations, 2 workers", epoch)
    return [
        rate("albumentations, in process", lambda: len(inline(batch).labels)),
        workers,
        rate("device, one_of", lambda: len(device(batch).labels)),
    ]


def loop_works(split: Split, accelerator: Accelerator) -> dict[str, Work]:
    """Return training loops around the null model; the unit is an image."""
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
        "... crop, flip, normalize by torchvision": accelerated(augment=True),
        "ours": ours(AugmentConfig()),
        "ours, crop and flip": ours(CROP_FLIP),
        "ours, one of five, on the device": ours(AUGMENTATIONS["one_of"]),
    }


def step_works(split: Split, accelerator: Accelerator) -> dict[str, Work]:
    """Return our step of two micro-batches and the same operations in plain PyTorch."""
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

    def plain() -> int:
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

    return {"plain PyTorch": plain, "ours": ours}


def speeds(works: dict[str, Work], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the throughput of each work, and its ratio to the tutorial's where there is one."""
    turns = take_turns(works, rounds=rounds, seconds=seconds)
    return [
        {
            "name": name,
            "images_per_second": median_range([turn.by_clock for turn in turns[name]]),
            "images_per_cpu_second": median_range([turn.by_cpu for turn in turns[name]]),
        }
        | ({"times_the_tutorial": ratios(turns, name, TUTORIAL)} if TUTORIAL in turns else {})
        for name in works
    ]


def overhead(turns: Turns) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds per step, and the overhead of ours over plain PyTorch."""
    cost = {name: [1000 / turn.by_cpu for turn in turns[name]] for name in turns}
    pairs = zip(cost["ours"], cost["plain PyTorch"], strict=True)
    cost["overhead"] = [ours - plain for ours, plain in pairs]
    return {name: median_range(values) for name, values in cost.items()}


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Format rows: images/s (median, minimum, maximum), per CPU second, ratio to the tutorial's."""
    lines = [
        f"{title:<42}{'images/s':>12}{'min - max':>24}{'per CPU s':>12}{'x CPU':>8}{'x wall':>9}"
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
        description="Measure the data path, the loop and the step on one CPU thread (5 minutes).",
    )
    parser.add_argument("--data", type=Path, default=Path("data/sample"), help="prepared data")
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    parser.add_argument("--rounds", type=int, default=7, help="turns per row (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds per turn (default: 0.5)"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError("--rounds, --seconds: must be greater than 0")
    split = load_split(options.data, "train")
    if len(split.labels) < BATCH_SIZE:
        raise UserError(f"--data {options.data}: needs at least {BATCH_SIZE} training rows")
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
    content["data_path"] = speeds(data_works(split), **turn)
    content["augmentations"] = speeds(augmentation_works(split), **turn)
    content["host_augmentation"] = host_rates(split, **turn)
    content["null_model_loop"] = speeds(loop_works(split, accelerator), **turn)
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
            f"augmentation, {row['name']:<20}{clock['median']:>10,.0f} images/s, "
            f"{cpu['median']:>10,.0f} per CPU s ({cpu['least']:,.0f} - {cpu['most']:,.0f})"
        )
    for row in content["host_augmentation"]:
        clock = row["images_per_second"]
        print(
            f"augmentation, {row['name']:<20}{clock['median']:>10,.0f} images/s "
            f"({clock['least']:,.0f} - {clock['most']:,.0f})"
        )
    print()
    print(table("training loop, null model", content["null_model_loop"]), end="\n\n")
    for name, cost in content["step_milliseconds"].items():
        print(
            f"step, two micro-batches, {name:<14}{cost['median']:8.3f} ms CPU "
            f"({cost['least']:.3f} - {cost['most']:.3f})"
        )
    if options.output:
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
