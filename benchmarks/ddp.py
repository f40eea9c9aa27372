"""What it costs to train together: two gloo processes under DDP against two that know nothing of each other.

They take turns in the same two processes, one thread each, on the CPU, so both have the same
neighbours; a turn begins on both at once. The CPU time is that of both, gloo's threads included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import Conditions, Measured, Turn
from ours import CROP_FLIP, OPTIM, our_batches, our_step

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.backbones import ModelConfig, build_model
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import train_step
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import make_scaler

PROCESSES, STEPS = 2, 4  # a turn has as many steps
TOGETHER, APART = "together: DDP", "apart: two independent trainings"
TOGETHER_BF16 = "together: DDP, run.grad_reduce_dtype=bf16"


def two_processes(conditions: Conditions) -> Measured:
    """Images a second of both processes; a unit is an image."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "turns.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={PROCESSES}", __file__, f"--data={conditions.data}"]
        command += [f"--rounds={3 * conditions.rounds}", f"--output={output}"]
        command.append(f"--backbone={conditions.backbone}")
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        subprocess.run(command, check=True, env=environment)
        found = json.loads(output.read_text())
    assert found["world_size"] == PROCESSES
    turns = {row: [Turn(*turn) for turn in turns] for row, turns in found["turns"].items()}
    facts = {name: found[name] for name in ("world_size", "batch_size")}
    return Measured(unit="images", turns=turns, facts=facts)


def take_turns_in_each(
    split: Split, *, rounds: int, batch_size: int, backbone: str
) -> dict[str, object] | None:
    """In each process; rank 0 has the sums over both. `batch_size` is a process's."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    ranks = DistContext.of(accelerator)
    assert ranks.world_size == PROCESSES, f"{ranks.world_size} processes, not {PROCESSES}"

    def steps(name: str) -> Callable[[], None]:
        world_size, rank = (1, 0) if name == APART else (PROCESSES, ranks.rank)
        total = world_size * batch_size
        config = ModelConfig(backbone=backbone)
        model = build_model(config, 100).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(OPTIM, model)
        objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
        if name != APART:
            update: StepFn = our_step(
                model,
                objective,
                optimizer,
                accelerator,
                precision="bf16",
                batch_size=total,
                micro_batches=PROCESSES,
                grad_reduce_dtype="bf16" if name == TOGETHER_BF16 else "fp32",
            )
        else:  # the same step without DDP around its model
            update = partial(
                train_step,
                accelerator,
                model,
                objective,
                optimizer,
                make_scaler("bf16", accelerator.device),
                precision="bf16",
                seed=0,
                batch_size=total,
                max_grad_norm=OPTIM.max_grad_norm,
            )
        batches = our_batches(
            split, batch_size=total, micro_batches=world_size, rank=rank, world_size=world_size
        )

        def run() -> None:
            for number in range(STEPS):
                update(next(batches), step=number)

        return run

    works = {name: steps(name) for name in (TOGETHER, APART, TOGETHER_BF16)}
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, work in works.items():
            ranks.all_reduce_max([0.0])  # all begin at once
            clock, cpu = time.perf_counter(), time.process_time()
            work()
            mine = (time.perf_counter() - clock, time.process_time() - cpu)
            everyone = ranks.all_gather_object(mine)
            if counted >= 0:
                images = STEPS * batch_size
                by_clock = sum(images / elapsed for elapsed, _ in everyone)
                used = sum(used for _, used in everyone)
                turns[name].append(Turn(by_clock, PROCESSES * images / used))
    destroy_distributed(accelerator)
    if not ranks.is_main:
        return None
    return {
        "world_size": ranks.world_size,
        "batch_size": batch_size,
        "turns": {
            name: [(turn.by_clock, turn.by_cpu) for turn in found] for name, found in turns.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process of `report.py --only ddp`.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    options = parser.parse_args()
    result = take_turns_in_each(
        load_split(options.data, "train"),
        rounds=options.rounds,
        batch_size=250,
        backbone=options.backbone,
    )
    if result is not None:
        write_json(options.output, result)
