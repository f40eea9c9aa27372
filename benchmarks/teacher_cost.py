"""Measure the cost of a teacher: step time and memory per rank for each placement.

`steps` times a ResNet-18 at 32 px without a teacher, with cached logits, and with a ResNet-50 at
224 px, replicated or sharded, in turns. `memory` measures the memory of a ViT-L/16 teacher per rank.
Both use random weights and start gloo processes with one thread each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from measure import Turn, machine, median_range, ratios, run_ranks
from safetensors.torch import save_file

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig, AugmentedBatch
from cifar_dist.data.batches import BatchPlan, gather_batch, train_batches
from cifar_dist.data.dataset import Split
from cifar_dist.distill.logit_cache import CacheWriter
from cifar_dist.distill.teacher import Teacher, TeacherConfig, TeacherWeights, build_teacher
from cifar_dist.distributed.context import DistContext, rank_mesh
from cifar_dist.distributed.ddp import wrap_ddp
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.distillation import Distill
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig, train_step
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import sha256, write_json
from cifar_dist.utils.precision import make_scaler

ROWS, CLASSES, VIEWS = 50_000, 100, 8
STUDENT = ModelConfig(backbone="resnet18", image_size=32)
TEACHER = ModelConfig(backbone="resnet50", image_size=224)
LARGE = ModelConfig(backbone="vit_large_patch16_224", image_size=224)
STEPS_PER_TURN = {"alone": 5, "cached": 5, "replicated": 1, "sharded": 1}
# Keep glibc from holding freed memory, which would count as memory in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
BATCH_SIZE = {1: 250, 2: 124}  # {number of processes: batch size per process}


def make_weights(config: ModelConfig, path: Path) -> None:
    torch.manual_seed(0)
    save_file(build_model(config, CLASSES).state_dict(), path)


def teacher_of(
    placement: str, config: ModelConfig, work: Path, context: DistContext
) -> Teacher | None:
    """Build the teacher as train.py does, from the files of the parent process."""
    if placement == "alone":
        return None
    weights = work / "teacher.safetensors"
    cache = str(work / "cache") if placement == "cached" else None
    teacher = TeacherConfig(run=str(work), placement=placement, cache=cache)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    return build_teacher(
        [teacher],
        [TeacherWeights(model=config, weights=weights, digest="", logit_scale=1.0)],
        num_classes=CLASSES,
        device=cpu,
        mesh=lambda over: rank_mesh(cpu, context.world_size, over=over),
    )


def time_steps(work: Path, rounds: int) -> dict[str, Any] | None:
    """Time the steps of all placements in each process; return the times on rank 0, else None."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    context = DistContext.of(accelerator)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=images, labels=torch.randint(0, CLASSES, (ROWS,)))
    batch_size = BATCH_SIZE[context.world_size] * context.world_size

    def steps_of(placement: str) -> Callable[[int], None]:
        augment = Augment(AugmentConfig(crop_padding=4, hflip=True, views=VIEWS), split)
        losses: dict[str, Loss] = {"cross_entropy": CrossEntropy(weight=0.3)}
        if placement != "alone":
            losses["distill"] = Distill(weight=0.7)
        objective = Objective(augment, losses, teacher_of(placement, TEACHER, work, context))
        model = build_model(STUDENT, CLASSES).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(OptimConfig(), model)
        wrapped = wrap_ddp(accelerator, model, micro_batches=context.world_size)
        scaler = make_scaler("bf16", accelerator.device)
        batches = train_batches(
            split,
            torch.arange(ROWS),
            BatchPlan(
                seed=0,
                shuffle=True,
                batch_size=batch_size,
                micro_batches=context.world_size,
                rank=context.rank,
                world_size=context.world_size,
            ),
            start_step=0,
        )

        def steps(count: int) -> None:
            for step in range(count):
                train_step(
                    accelerator,
                    wrapped,
                    objective,
                    optimizer,
                    scaler,
                    StepConfig(precision="bf16", seed=0, batch_size=batch_size, max_grad_norm=5.0),
                    next(batches),
                    step=step,
                )

        return steps

    placements = [name for name in STEPS_PER_TURN if name != "sharded" or context.world_size > 1]
    works = {name: steps_of(name) for name in placements}
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, steps in works.items():
            count = STEPS_PER_TURN[name]
            clock, cpu = time.perf_counter(), time.process_time()
            steps(count)
            elapsed, used = time.perf_counter() - clock, time.process_time() - cpu
            if counted >= 0:
                turns[name].append(Turn(count / elapsed, count / used))
    destroy_distributed(accelerator)
    if not context.is_main:
        return None
    return {
        "world_size": context.world_size,
        "batch_size": batch_size,
        "milliseconds": {
            name: {
                "cpu": median_range([1000 / turn.by_cpu for turn in row]),
                "clock": median_range([1000 / turn.by_clock for turn in row]),
            }
            for name, row in turns.items()
        },
        "cost_against_alone": {name: ratios(turns, "alone", name) for name in works},
        "cost_against_cached": {name: ratios(turns, "cached", name) for name in works},
    }


def anonymous_memory() -> int:
    """Return the anonymous memory of this process in bytes, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["RssAnon"].split()[0]) * 1024


def watch_memory(work: Path, placement: str) -> dict[str, Any] | None:
    """Measure what a ViT-L teacher adds to each rank: at rest, while loading, in a forward pass."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    context = DistContext.of(accelerator)
    before, peak, stop = anonymous_memory(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous_memory())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    teacher = teacher_of(placement, LARGE, work, context)
    assert teacher is not None
    at_rest, built = anonymous_memory(), peak
    peak = 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            teacher_logits(teacher, images)
    stop.set()
    watcher.join()
    local = {
        "parameters": teacher.local_num_params,
        "at_rest": at_rest - before,
        "peak_while_built": built - before,
        "peak_of_a_forward": peak - before,
    }
    all_ranks = context.all_gather_object(local)
    destroy_distributed(accelerator)
    return {"placement": placement, "ranks": all_ranks} if context.is_main else None


def teacher_logits(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    rows = torch.zeros(len(images), dtype=torch.int64)
    view = AugmentedBatch(images=images, labels=rows, view_ids=rows)
    return teacher(
        view, gather_batch(Split(images=images, labels=rows), rows, epoch=0, micro_batch=0)
    )


def measure_steps(work: Path, rounds: int) -> dict[str, Any]:
    make_weights(TEACHER, work / "teacher.safetensors")
    writer = CacheWriter(work / "cache", (VIEWS, ROWS, CLASSES), {}, force=False)
    for _ in range(VIEWS):
        writer.append(torch.randn(ROWS, CLASSES).half())
    writer.finish()
    runs = [
        run_ranks(
            __file__, size, "--child=steps", f"--work={work}", f"--rounds={rounds}", **ALLOCATOR
        )
        for size in (1, 2)
    ]
    for run in runs:
        print(f"{run['world_size']} process(es), batch {run['batch_size']}, per step:")
        for name, times in run["milliseconds"].items():
            to_alone = run["cost_against_alone"][name]["by_cpu"]["median"]
            to_cached = run["cost_against_cached"][name]["by_cpu"]["median"]
            print(
                f"  {name:<10} {times['cpu']['median']:9.1f} ms CPU  {times['clock']['median']:9.1f} ms"
                f"  {to_alone:.2f} x alone, {to_cached:.2f} x cached (CPU)"
            )
    return {
        "what": "teacher_cost_steps",
        "student": "resnet18@32",
        "teacher": "resnet50@224",
        "runs": runs,
    }


def measure_memory(work: Path) -> dict[str, Any]:
    make_weights(LARGE, work / "teacher.safetensors")
    size = (work / "teacher.safetensors").stat().st_size
    runs = []
    for world_size in (2, 4):
        for placement in ("replicated", "sharded"):
            arguments = ("--child=memory", f"--placement={placement}", f"--work={work}")
            runs.append(run_ranks(__file__, world_size, *arguments, **ALLOCATOR))
            for rank, numbers in enumerate(runs[-1]["ranks"]):
                mebibytes = "  ".join(
                    f"{name} {value / 2**20:,.0f} MiB"
                    for name, value in numbers.items()
                    if name != "parameters"
                )
                print(
                    f"{placement:<10} rank {rank} of {world_size}: "
                    f"{numbers['parameters']:,} parameters  {mebibytes}"
                )
    digest = sha256(work / "teacher.safetensors")
    return {"what": "teacher_cost_memory", "file_bytes": size, "weights": digest, "runs": runs}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("steps", "memory"), default="steps")
    parser.add_argument("--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", choices=("steps", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    result: dict[str, Any] | None
    if options.child == "steps":
        result = time_steps(options.work, options.rounds)
    elif options.child == "memory":
        result = watch_memory(options.work, options.placement)
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            steps = options.what == "steps"
            measured = measure_steps(work, options.rounds) if steps else measure_memory(work)
            result = {"machine": machine(), **measured}
    if result is not None:
        write_json(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
