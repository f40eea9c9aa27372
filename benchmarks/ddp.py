"""Compare two gloo processes that sum gradients with two independent runs, on the CPU, one thread each.

Both take turns in the same two processes, so background load affects them alike. A turn starts in
both processes at once. CPU time is the sum over both processes, including gloo's threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import Conditions, Measurement, Turn, run_ranks
from ours import CROP_FLIP, OPTIM, our_batches, our_step

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig, train_step
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import auto_precision, make_scaler

PROCESSES, STEPS = 2, 4  # steps per turn
EXACT, DDP, INDEPENDENT = "exact sums (the default)", "DDP", "two independent runs"
DDP_BF16 = "DDP, run.grad_reduce_dtype=bf16"


def two_processes(conditions: Conditions) -> Measurement:
    """Measure the throughput of both processes together; the unit is an image."""
    result = run_ranks(
        __file__,
        PROCESSES,
        f"--data={conditions.data}",
        f"--rounds={3 * conditions.rounds}",
        f"--backbone={conditions.backbone}",
    )
    assert result["world_size"] == PROCESSES
    turns = {row: [Turn(*turn) for turn in turns] for row, turns in result["turns"].items()}
    facts = {name: result[name] for name in ("world_size", "batch_size")}
    return Measurement(unit="images", turns=turns, facts=facts)


def take_turns_in_each(
    split: Split, *, rounds: int, batch_size: int, backbone: str
) -> dict[str, object] | None:
    """Measure in each process; return the sums over both on rank 0, else None.

    `batch_size` is per process.
    """
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    context = DistContext.of(accelerator)
    assert context.world_size == PROCESSES, f"{context.world_size} processes, not {PROCESSES}"

    precision = auto_precision(accelerator.device)

    def steps(name: str) -> Callable[[], None]:
        world_size, rank = (1, 0) if name == INDEPENDENT else (PROCESSES, context.rank)
        total = world_size * batch_size
        config = ModelConfig(backbone=backbone)
        model = build_model(config, 100).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(OPTIM, model)
        objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
        if name != INDEPENDENT:
            update: StepFn = our_step(
                model,
                objective,
                optimizer,
                accelerator,
                precision=precision,
                batch_size=total,
                micro_batches=PROCESSES,
                reduction="exact" if name == EXACT else "ddp",
                grad_reduce_dtype="bf16" if name == DDP_BF16 else "fp32",
            )
        else:  # the same step without a reduction
            update = partial(
                train_step,
                accelerator,
                model,
                objective,
                optimizer,
                make_scaler(precision, accelerator.device),
                StepConfig(
                    precision=precision, seed=0, batch_size=total, max_grad_norm=OPTIM.max_grad_norm
                ),
            )
        batches = our_batches(
            split, batch_size=total, micro_batches=world_size, rank=rank, world_size=world_size
        )

        def run() -> None:
            for number in range(STEPS):
                update(next(batches), step=number)

        return run

    works = {name: steps(name) for name in (EXACT, DDP, INDEPENDENT, DDP_BF16)}
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, work in works.items():
            context.all_reduce_max([0.0])  # start both at once
            clock, cpu = time.perf_counter(), time.process_time()
            work()
            local = (time.perf_counter() - clock, time.process_time() - cpu)
            all_ranks = context.all_gather_object(local)
            if counted >= 0:
                images = STEPS * batch_size
                by_clock = sum(images / elapsed for elapsed, _ in all_ranks)
                used = sum(used for _, used in all_ranks)
                turns[name].append(Turn(by_clock, PROCESSES * images / used))
    destroy_distributed(accelerator)
    if not context.is_main:
        return None
    return {
        "world_size": context.world_size,
        "batch_size": batch_size,
        "turns": {
            name: [(turn.by_clock, turn.by_cpu) for turn in row] for name, row in turns.items()
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
