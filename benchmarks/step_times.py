"""Time training steps of recipes: wall time, host time and kernels.

    python benchmarks/step_times.py --output step_times.json
    python benchmarks/step_times.py r18_32 vit_b_384 run.cuda_graphs=off --output two.json

Images and weights are random, including the teacher's, so no data set is needed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from gpu import current_gpu, floor_milliseconds
from measure import synchronize
from ours import our_batches
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import Split
from cifar_dist.distill.teacher import OnlineTeacher
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.freeze import freeze
from cifar_dist.optim.averaging import build_average
from cifar_dist.optim.optimizer import build_optimizer, set_learning_rate
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.training.cuda_graphs import WARM_UP
from cifar_dist.training.environment import git_commit
from cifar_dist.training.graphed_step import build_step
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig
from cifar_dist.utils.host import processor_name
from cifar_dist.utils.precision import make_scaler
from cifar_dist.utils.recipe_files import find_recipe

ROWS, CLASSES = 50_000, 100

# (row name, recipe, overrides)
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    ("r18_32: 4 micro-batches of 125", "r18_32", ()),
    ("r18_32: 2 of 250", "r18_32", ("run.micro_batches=2",)),
    ("r18_32: 1 of 500", "r18_32", ("run.micro_batches=1",)),
    ("r18_32: 4 of 125, eager", "r18_32", ("run.cuda_graphs=off",)),
    ("r18_32: 1 of 500, eager", "r18_32", ("run.micro_batches=1", "run.cuda_graphs=off")),
    ("tutorial's ResNet-18, fp32", "tutorial/resnet18_baseline", ()),
    ("tutorial's ResNet-18, bf16", "tutorial/resnet18_baseline", ("run.precision=bf16",)),
    (
        "tutorial's ResNet-18, bf16, eager",
        "tutorial/resnet18_baseline",
        ("run.precision=bf16", "run.cuda_graphs=off"),
    ),
    ("r18_32 with RandAugment", "r18_32_rand_augment", ()),
    ("r18_32 with MixUp and CutMix", "r18_32_mix", ()),
    ("speed_75 at 32 px", "speed_75", ("model.progressive_resize=null",)),
    ("r50_224: 1 of 64, one GPU of eight", "r50_224", ("run.batch_size=64", "run.micro_batches=1")),
    (
        "r50_224: 1 of 64, eager",
        "r50_224",
        ("run.batch_size=64", "run.micro_batches=1", "run.cuda_graphs=off"),
    ),
    ("r18_32_kd, ResNet-50 teacher at 224 px", "r18_32_kd", ()),
    ("wrn28_10_32", "wrn28_10_32", ()),
    ("r18_32: 1 of 500, compiled", "r18_32", ("run.micro_batches=1", "run.compile=true")),
]


@dataclass(frozen=True)
class Loop:
    """The training step of train.py, without evaluation, logging and checkpoints."""

    step: Callable[[], None]
    recipe: Recipe
    device: torch.device


def build_loop(recipe: Recipe, accelerator: Accelerator) -> Loop:
    run, device = recipe.run, accelerator.device
    images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, device=device)
    split = Split(images=images, labels=torch.randint(0, CLASSES, (ROWS,), device=device))
    micro_batches = run.micro_batches or 1
    config = replace(recipe.model, pretrained=False)
    model = build_model(config, CLASSES).to(device).to(memory_format=torch.channels_last)
    freeze(model, config.freeze, epoch=0)
    teacher = None
    if any(loss.needs_teacher for loss in recipe.losses.values()):
        teacher_config = ModelConfig(backbone="resnet50", image_size=224, interpolation="bicubic")
        teacher = OnlineTeacher(
            build_model(teacher_config, CLASSES).to(device).eval().requires_grad_(False), 1.0
        )
    objective = Objective(Augment(recipe.augment, split), recipe.losses, teacher)
    optimizer = build_optimizer(recipe.optim, model)
    average = build_average(recipe.averaging, model, steps_per_epoch=100, total_steps=10**6)
    window = MetricWindow(objective.names, micro_batches=micro_batches, device=device)
    batches = our_batches(split, batch_size=run.batch_size, micro_batches=micro_batches)
    if run.compile:
        model.compile()
    take_step = build_step(
        accelerator,
        model,
        objective,
        optimizer,
        make_scaler(run.precision, device),
        StepConfig(
            precision=run.precision,
            seed=0,
            batch_size=run.batch_size,
            max_grad_norm=recipe.optim.max_grad_norm,
            sam=recipe.optim.sam,
            grad_reduce_dtype=run.grad_reduce_dtype,
        ),
        cuda_graphs=run.cuda_graphs,
        micro_batches=micro_batches,
    )
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        set_learning_rate(optimizer, 1e-3 / (1 + number % 5))
        window.add(take_step(next(batches), step=number))
        if average:
            average.update(model, number + 1)

    return Loop(step, recipe, device)


def measure(loop: Loop, *, seconds: float) -> dict[str, Any]:
    """Return the times of one step, as medians over blocks of steps.

    `milliseconds` is wall time until the device is done, `host_milliseconds` until all is enqueued.
    """
    cuda = loop.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(WARM_UP + 3):
        loop.step()
    synchronize(loop.device)
    result: dict[str, Any] = {"first_steps_seconds": time.perf_counter() - started}
    started = time.perf_counter()
    loop.step()
    synchronize(loop.device)
    block = max(1, min(20, int(seconds / 5 / (time.perf_counter() - started))))
    wall: list[float] = []
    host: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(wall) < 3:
        started = time.perf_counter()
        for _ in range(block):
            loop.step()
        host.append((time.perf_counter() - started) / block)
        synchronize(loop.device)
        wall.append((time.perf_counter() - started) / block)
    result |= {
        "milliseconds": 1e3 * statistics.median(wall),
        "least_milliseconds": 1e3 * min(wall),
        "most_milliseconds": 1e3 * max(wall),
        "host_milliseconds": 1e3 * statistics.median(host),
        "images_per_second": loop.recipe.run.batch_size / statistics.median(wall),
        "blocks": len(wall),
        "steps_per_block": block,
    }
    if cuda:
        result["allocated_mib"] = torch.cuda.max_memory_allocated() >> 20
        result["reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
    return result | kernels(loop)


def kernels(loop: Loop, *, longest: int = 12) -> dict[str, Any]:
    """Return the number of kernels of a step, their total time and the `longest` kernels.

    Copies between host and device count as kernels. Return nothing on a CPU.
    """
    if loop.device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loop.step()
        synchronize(loop.device)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time
            counts[event.name] += 1
    launches = sum(
        event.name.startswith(
            ("cudaLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cuLaunch")
        )
        for event in profiler.events() or ()
    )
    return {
        "kernels": sum(counts.values()),
        "launches": launches,
        "kernel_milliseconds": sum(times.values()) / 1e3,
        "longest_kernels": [
            {"name": name[:120], "count": counts[name], "milliseconds": time / 1e3}
            for name, time in times.most_common(longest)
        ],
    }


def floor(recipe: Recipe) -> float | None:
    """Return the minimum time of a step by the data sheet in milliseconds, if known."""
    gpu = current_gpu()
    if gpu is None or any(loss.needs_teacher for loss in recipe.losses.values()):
        return None
    return floor_milliseconds(recipe.model, recipe.run.batch_size, gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | section.key=value",
        help="recipes instead of the built-in rows, and overrides for all of them",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds per row")
    parser.add_argument("--only", default="", help="substring of the rows to run")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all rows")
    options = parser.parse_intermixed_args()
    torch.backends.cudnn.benchmark = True  # as init_distributed sets it
    accelerator = Accelerator()
    words = tuple(word for word in options.words if "=" in word)
    named = [(" ".join([word, *words]), word, words) for word in options.words if word not in words]
    cases = [
        (row, find_recipe(recipe), (*overrides, *options.set))
        for row, recipe, overrides in named or CASES
        if options.only in row
    ]
    on_gpu = accelerator.device.type == "cuda"
    report: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "steps": {},
    }
    print(
        f"{'':44}{'ms':>8}{'host':>8}{'kernels':>9}{'busy':>8}{'floor':>8}{'images/s':>10}{'MiB':>8}"
    )
    for row, recipe_path, overrides in cases:
        recipe = load_recipe(recipe_path, list(overrides))
        try:
            result = measure(build_loop(recipe, accelerator), seconds=options.seconds)
            result["floor_milliseconds"] = floor(recipe)
        except Exception as error:  # continue with the other rows
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        report["steps"][row] = result
        options.output.write_text(json.dumps(report, indent=1))
        if "error" in result:
            print(f"{row:44}{result['error'][:110]}", flush=True)
        else:
            print(
                f"{row:44}{result['milliseconds']:8.3f}{result['host_milliseconds']:8.3f}"
                f"{result.get('kernels', 0):9}{result.get('kernel_milliseconds', 0):8.3f}"
                f"{result['floor_milliseconds'] or 0:8.3f}{result['images_per_second']:10.0f}"
                f"{result.get('allocated_mib', 0):8}",
                flush=True,
            )
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
