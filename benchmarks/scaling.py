"""Measure the throughput of one to four gloo processes on one machine, 250 images each.

Launches take turns (1 2 3 4, 1 2 3 4, ...). With more processes than cores, wall time only shows that
they share the cores; the cost of communication is in the CPU time per image (with gloo's threads).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from measure import run_ranks
from ours import CROP_FLIP, OPTIM, our_batches, our_model, our_step

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.objective import Objective
from cifar_dist.utils.files import write_json

WORLDS, BATCH_SIZE, STEPS = (1, 2, 3, 4), 250, 4


def work(data: Path, output: Path) -> None:
    """Run a warm-up step and STEPS steps in each process; rank 0 writes the sums to `output`."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    context = DistContext.of(accelerator)
    split, total = load_split(data, "train"), BATCH_SIZE * context.world_size
    model = our_model(accelerator.device, ModelConfig(backbone="resnet18"))
    optimizer = build_optimizer(OPTIM, model)
    update = our_step(
        model,
        Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()}),
        optimizer,
        accelerator,
        precision="bf16",
        batch_size=total,
        micro_batches=context.world_size,
    )
    batches = our_batches(
        split,
        batch_size=total,
        micro_batches=context.world_size,
        rank=context.rank,
        world_size=context.world_size,
    )
    update(next(batches), step=0)
    context.all_reduce_max([0.0])  # start all at once
    clock, cpu = time.perf_counter(), time.process_time()
    for step in range(1, STEPS + 1):
        update(next(batches), step=step)
    local = time.perf_counter() - clock, time.process_time() - cpu
    all_ranks, images = context.all_gather_object(local), STEPS * total
    result = {
        "world_size": context.world_size,
        "images_per_second": images / max(elapsed for elapsed, _ in all_ranks),
        "images_per_cpu_second": images / sum(used for _, used in all_ranks),
    }
    if context.is_main:
        write_json(output, result)
    destroy_distributed(accelerator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # of the processes
    options = parser.parse_args()
    if options.output:
        work(options.data, options.output)
        return
    results: dict[int, list[dict[str, float]]] = {world_size: [] for world_size in WORLDS}
    for _ in range(options.rounds):
        for world_size in WORLDS:
            result = run_ranks(__file__, world_size, f"--data={options.data}")
            assert result["world_size"] == world_size
            results[world_size].append(result)
    print(f"| processes | images/s, {options.rounds} rounds | images per CPU second | relative |")
    print("|---|---|---|---|")
    for world_size, turns in results.items():
        clock = [turn["images_per_second"] for turn in turns]
        cpu = [turn["images_per_cpu_second"] for turn in turns]
        single = [turn["images_per_cpu_second"] for turn in results[1]]
        ratio = median(many / one for many, one in zip(cpu, single, strict=True))
        print(
            f"| {world_size} | {median(clock):.0f} ({min(clock):.0f} to {max(clock):.0f}) "
            f"| {median(cpu):.0f} ({min(cpu):.0f} to {max(cpu):.0f}) | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
