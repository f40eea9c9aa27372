"""What a teacher costs: time of a step and memory of a rank, whole, sharded and cached.

`steps`: a ResNet-18 at 32 px alone, from cached logits, and with a ResNet-50 at 224 px that looks
at each view, whole or sharded; they take turns in one run. `memory`: what each rank holds of a
ViT-L/16 teacher. Weights are random: neither time nor memory depends on them. Both start their own
gloo processes, one thread each.
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
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from measure import Turn, machine, ratios, spread
from safetensors.torch import save_file

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig, AugmentedBatch
from cifar_dist.data.batches import gather_batch, train_batches
from cifar_dist.data.dataset import Split
from cifar_dist.distill.logit_cache import CacheWriter
from cifar_dist.distill.teacher import Teacher, TeacherConfig, TeacherWeights, build_teacher
from cifar_dist.distributed.context import DistContext, rank_mesh
from cifar_dist.distributed.ddp import wrap_ddp
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy, Distill
from cifar_dist.models.backbones import ModelConfig, build_model
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import train_step
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import sha256, write_json
from cifar_dist.utils.precision import make_scaler

ROWS, CLASSES, VIEWS = 50_000, 100, 8
STUDENT = ModelConfig(backbone="resnet18", image_size=32)
TEACHER = ModelConfig(backbone="resnet50", image_size=224)
LARGE = ModelConfig(backbone="vit_large_patch16_224", image_size=224)
STEPS_A_TURN = {"alone": 5, "cached": 5, "replicated": 1, "sharded": 1}
BATCH_SIZE = {1: 250, 2: 124}  # of a process, by the number of processes


def make_weights(config: ModelConfig, path: Path) -> None:
    torch.manual_seed(0)
    save_file(build_model(config, CLASSES).state_dict(), path)


def teacher_of(
    placement: str, config: ModelConfig, work: Path, ranks: DistContext
) -> Teacher | None:
    """As train.py builds it, from the files that the parent process has made."""
    if placement == "alone":
        return None
    weights = work / "teacher.safetensors"
    cache = str(work / "cache") if placement == "cached" else None
    asked = TeacherConfig(run=str(work), placement=placement, cache=cache)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    return build_teacher(
        [asked],
        [TeacherWeights(model=config, weights=weights, digest="", logit_scale=1.0)],
        num_classes=CLASSES,
        device=cpu,
        mesh=lambda over: rank_mesh(cpu, ranks.world_size, over=over),
    )


# ----------------------------------------------------------------------------- in each process


def time_steps(work: Path, rounds: int) -> dict[str, Any] | None:
    """Steps of all placements in turns; on rank 0 what they took."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    ranks = DistContext.of(accelerator)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=images, labels=torch.randint(0, CLASSES, (ROWS,)))
    batch_size = BATCH_SIZE[ranks.world_size] * ranks.world_size

    def work_of(placement: str) -> Callable[[int], None]:
        augment = Augment(AugmentConfig(crop_padding=4, hflip=True, views=VIEWS), split)
        losses: dict[str, Loss] = {"cross_entropy": CrossEntropy(weight=0.3)}
        if placement != "alone":
            losses["distill"] = Distill(weight=0.7)
        objective = Objective(augment, losses, teacher_of(placement, TEACHER, work, ranks))
        model = build_model(STUDENT, CLASSES).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(OptimConfig(), model)
        wrapped = wrap_ddp(accelerator, model, micro_batches=ranks.world_size)
        scaler = make_scaler("bf16", accelerator.device)
        batches = train_batches(
            split,
            torch.arange(ROWS),
            seed=0,
            shuffle=True,
            batch_size=batch_size,
            micro_batches=ranks.world_size,
            start_step=0,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

        def steps(count: int) -> None:
            for step in range(count):
                train_step(
                    accelerator,
                    wrapped,
                    objective,
                    optimizer,
                    scaler,
                    next(batches),
                    precision="bf16",
                    seed=0,
                    step=step,
                    batch_size=batch_size,
                    max_grad_norm=5.0,
                )

        return steps

    placements = [name for name in STEPS_A_TURN if name != "sharded" or ranks.world_size > 1]
    works = {name: work_of(name) for name in placements}
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, steps in works.items():
            count = STEPS_A_TURN[name]
            clock, cpu = time.perf_counter(), time.process_time()
            steps(count)
            elapsed, used = time.perf_counter() - clock, time.process_time() - cpu
            if counted >= 0:
                turns[name].append(Turn(count / elapsed, count / used))
    destroy_distributed(accelerator)
    if not ranks.is_main:
        return None
    return {
        "world_size": ranks.world_size,
        "batch_size": batch_size,
        "milliseconds": {
            name: {
                "cpu": spread([1000 / turn.by_cpu for turn in found]),
                "clock": spread([1000 / turn.by_clock for turn in found]),
            }
            for name, found in turns.items()
        },
        "cost_against_alone": {name: ratios(turns, "alone", name) for name in works},
        "cost_against_cached": {name: ratios(turns, "cached", name) for name in works},
    }


def own_memory() -> int:
    """This process's own memory now, in bytes; the pages of mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["RssAnon"].split()[0]) * 1024


def watch_memory(work: Path, placement: str) -> dict[str, Any] | None:
    """What a ViT-L teacher adds to each rank: at rest, and at most while it is built and looks."""
    accelerator = init_distributed(timeout_seconds=600, threads=1)
    ranks = DistContext.of(accelerator)
    before, peak, stop = own_memory(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, own_memory())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    teacher = teacher_of(placement, LARGE, work, ranks)
    assert teacher is not None
    at_rest, built = own_memory(), peak
    peak = 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            look(teacher, images)
    stop.set()
    watcher.join()
    mine = {
        "parameters": teacher.local_num_params,
        "at_rest": at_rest - before,
        "peak_while_built": built - before,
        "peak_of_a_forward": peak - before,
    }
    everyone = ranks.all_gather_object(mine)
    destroy_distributed(accelerator)
    return {"placement": placement, "ranks": everyone} if ranks.is_main else None


def look(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    rows = torch.zeros(len(images), dtype=torch.int64)
    view = AugmentedBatch(images=images, labels=rows, view_ids=rows)
    return teacher(
        view, gather_batch(Split(images=images, labels=rows), rows, epoch=0, micro_batch=0)
    )


# ----------------------------------------------------------------------------- the parent


def run_ranks(world_size: int, *arguments: str) -> dict[str, Any]:
    """This file again as `world_size` processes; what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", __file__, *arguments, f"--output={output}"]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            # glibc keeps freed memory of tens of MiB for later, which would pass for weights in use
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
        }
        subprocess.run(command, check=True, env=environment)
        return json.loads(output.read_text())


def measure_steps(work: Path, rounds: int) -> dict[str, Any]:
    make_weights(TEACHER, work / "teacher.safetensors")
    writer = CacheWriter(work / "cache", (VIEWS, ROWS, CLASSES), {}, force=False)
    for _ in range(VIEWS):
        writer.append(torch.randn(ROWS, CLASSES).half())
    writer.finish()
    runs = [
        run_ranks(size, "--child=steps", f"--work={work}", f"--rounds={rounds}") for size in (1, 2)
    ]
    for run in runs:
        print(f"{run['world_size']} process(es), batch {run['batch_size']}, a step:")
        for name, found in run["milliseconds"].items():
            to_alone = run["cost_against_alone"][name]["by_cpu"]["median"]
            to_cached = run["cost_against_cached"][name]["by_cpu"]["median"]
            print(
                f"  {name:<8} {found['cpu']['median']:9.1f} ms of CPU  {found['clock']['median']:9.1f} ms"
                f"  x {to_alone:.2f} of alone, x {to_cached:.2f} of cached (CPU)"
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
    found = []
    for world_size in (2, 4):
        for placement in ("replicated", "sharded"):
            child = f"--placement={placement}"
            found.append(run_ranks(world_size, "--child=memory", child, f"--work={work}"))
            for rank, numbers in enumerate(found[-1]["ranks"]):
                mebibytes = "  ".join(
                    f"{name} {value / 2**20:,.0f} MiB"
                    for name, value in numbers.items()
                    if name != "parameters"
                )
                print(
                    f"{placement:<8} rank {rank} of {world_size}: "
                    f"{numbers['parameters']:,} parameters  {mebibytes}"
                )
    digest = sha256(work / "teacher.safetensors")
    return {"what": "teacher_cost_memory", "file_bytes": size, "weights": digest, "runs": found}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("steps", "memory"), default="steps")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
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
