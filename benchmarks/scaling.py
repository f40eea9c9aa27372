"""One to four gloo processes on one machine, 250 images each: images a second, by the clock and by CPU time.

Launches take turns (1 2 3 4, 1 2 3 4, ...). With more processes than cores the clock only shows that
they share them; what training together costs is in the CPU time of an image, gloo's threads included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from ours import CROP_FLIP, OPTIM, our_batches, our_model, our_step

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.backbones import ModelConfig
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.objective import Objective

WORLDS, BATCH_SIZE, STEPS = (1, 2, 3, 4), 250, 4


def work(data: Path) -> None:
    """In each process: a step that does not count, then STEPS; rank 0 prints the sums over all."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    ranks = DistContext.of(accelerator)
    split, total = load_split(data, "train"), BATCH_SIZE * ranks.world_size
    model = our_model(accelerator.device, ModelConfig(backbone="resnet18"))
    optimizer = build_optimizer(OPTIM, model)
    update = our_step(
        model,
        Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()}),
        optimizer,
        accelerator,
        precision="bf16",
        batch_size=total,
        micro_batches=ranks.world_size,
    )
    batches = our_batches(
        split,
        batch_size=total,
        micro_batches=ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    update(next(batches), step=0)
    ranks.all_reduce_max([0.0])  # all begin at once
    clock, cpu = time.perf_counter(), time.process_time()
    for step in range(1, STEPS + 1):
        update(next(batches), step=step)
    mine = time.perf_counter() - clock, time.process_time() - cpu
    everyone, images = ranks.all_gather_object(mine), STEPS * total
    found = {
        "world_size": ranks.world_size,
        "images_per_second": images / max(elapsed for elapsed, _ in everyone),
        "images_per_cpu_second": images / sum(used for _, used in everyone),
    }
    if ranks.is_main:
        print(json.dumps(found))
    destroy_distributed(accelerator)


def launch(data: Path, world_size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", __file__, f"--data={data}", "--work"]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, check=True, env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["world_size"] == world_size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    options = parser.parse_args()
    if options.work:
        work(options.data)
        return
    found: dict[int, list[dict[str, float]]] = {world_size: [] for world_size in WORLDS}
    for _ in range(options.rounds):
        for world_size in WORLDS:
            found[world_size].append(launch(options.data, world_size))
    print(
        f"| processes | images/s, {options.rounds} rounds | images per CPU second | against one |"
    )
    print("|---|---|---|---|")
    for world_size, turns in found.items():
        clock = [turn["images_per_second"] for turn in turns]
        cpu = [turn["images_per_cpu_second"] for turn in turns]
        alone = [turn["images_per_cpu_second"] for turn in found[1]]
        ratio = median(mine / one for mine, one in zip(cpu, alone, strict=True))
        print(
            f"| {world_size} | {median(clock):.0f} ({min(clock):.0f} to {max(clock):.0f}) "
            f"| {median(cpu):.0f} ({min(cpu):.0f} to {max(cpu):.0f}) | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
