"""Write a recipe's cached teachers down: their logits for every view of every training row.

Blocks of rows are dealt over the processes in their order, and rank 0 appends what they found. So a
kill costs seconds, and any number of processes goes on to the same bytes.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()

import math
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import gather_batch, split_train_val
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distill.logit_cache import CacheWriter
from cifar_dist.distill.teacher import OnlineTeacher, TeacherConfig, build_online_teacher
from cifar_dist.distributed.context import DistContext, rank_mesh
from cifar_dist.distributed.ddp import gather_blocks
from cifar_dist.distributed.error_propagation import propagate_errors
from cifar_dist.distributed.launch import init_distributed, set_slurm_env
from cifar_dist.evaluation.evaluator import BLOCK_SIZE
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.teachers import cache_fingerprint, find_teacher
from cifar_dist.tracking.background_jobs import track_cache
from cifar_dist.training.lock import run_lock
from cifar_dist.utils.cli import add_recipe, command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.log import log, log_to_terminal, progress_bar
from cifar_dist.utils.precision import autocast, check_precision


def blocks_from(done: int, shape: list[int]) -> list[tuple[int, int, int]]:
    """(view, first row, rows) of each block after the first `done` of V * N pictures, in file order."""
    views, rows, _ = shape
    starts = range(0, rows, BLOCK_SIZE)
    blocks = [
        (view, start, min(BLOCK_SIZE, rows - start)) for view in range(views) for start in starts
    ]
    return [block for block in blocks if block[0] * rows + block[1] >= done]


class TeacherRunner:
    """What a teacher says about a block of one view; the last view's tables are kept."""

    def __init__(self, recipe: Recipe, split: Split, teacher: OnlineTeacher) -> None:
        self.recipe, self.split, self.teacher = recipe, split, teacher
        rows = None  # to choose partners among
        if recipe.data.val_size:
            rows, _ = split_train_val(split.labels, recipe.data.val_size)
        self.augment = Augment(recipe.augment, split, rows)

    def __call__(self, view: int, first: int, count: int) -> Tensor:
        """float16 [BLOCK_SIZE, C], filled up with zeros."""
        if self.augment.number != view:
            self.augment = self.augment.clone(number=view)
        device = self.split.labels.device
        batch = gather_batch(
            self.split, torch.arange(first, first + count, device=device), epoch=0, micro_batch=0
        )
        with autocast(self.recipe.run.precision, device):
            logits = self.teacher(self.augment(batch), batch)
        return nn.functional.pad(logits.half(), (0, 0, 0, BLOCK_SIZE - count))


def cache_teacher(
    recipe: Recipe,
    asked: TeacherConfig,
    *,
    sharded: bool,
    force: bool,
    context: DistContext,
    device: torch.device,
) -> int:
    """Make the cache of one teacher, or go on with it; 0 when it is complete, else the stop signal."""
    folder = asked.cache_folder
    with ExitStack() as stack:
        lock = run_lock(folder, folder.with_name(f"{folder.name}.lock"), remedy="teacher.cache=...")
        context.run_on_main(lambda: stack.enter_context(lock))
        found = context.run_on_main(lambda: find_teacher(asked))
        made_of = context.run_on_main(lambda: cache_fingerprint(recipe, found))
        shape = made_of["shape"]
        files: list[CacheWriter] = []  # rank 0 alone writes

        def begin() -> tuple[int, bool]:
            files.append(CacheWriter(folder, shape, made_of, force=force))
            return files[0].rows, files[0].is_finished

        def append(logits: Tensor) -> None:
            files[0].append(logits)

        done, finished = context.run_on_main(begin)
        if finished:
            log.info(f"{folder} is complete: {shape[0]} views of {shape[1]:,} rows")
            return 0

        split = load_split(Path(recipe.data.path), "train", device, recipe.data.place)
        mesh = rank_mesh(device, context.world_size, over=asked.shard_over) if sharded else None
        viewer = TeacherRunner(
            recipe, split, build_online_teacher(asked, found, shape[2], device, mesh)
        )
        log.info(
            f"{folder}: {shape[0]} views of {shape[1]:,} rows, {math.prod(shape) * 2 / 2**20:,.0f} MiB"
            + (f"; goes on after {done:,} of {math.prod(shape[:2]):,} pictures" if done else "")
        )
        bar = stack.enter_context(
            progress_bar(done, math.prod(shape[:2]), shown=context.is_main, unit="picture")
        )
        blocks, started = blocks_from(done, shape), time.perf_counter()
        for first in range(0, len(blocks), context.world_size):
            # Ranks without a block repeat the last one: a sharded teacher needs all at each call.
            mine = viewer(*blocks[min(first + context.rank, len(blocks) - 1)])
            gathered = gather_blocks(mine[None], context).cpu()  # [W, BLOCK_SIZE, C]
            counts = [count for _, _, count in blocks[first : first + context.world_size]]
            # the padding goes: only a view's last block has some
            logits = torch.cat([gathered[place, :count] for place, count in enumerate(counts)])
            context.run_on_main(partial(append, logits))
            bar.update(sum(counts))
            stop = int(context.all_reduce_max([signals.stop_signal()])[0])
            if stop:
                context.run_on_main(lambda: files[0].save())
                return stop
        context.run_on_main(lambda: files[0].finish())
        seconds = time.perf_counter() - started
        pictures = math.prod(shape[:2]) - done
        log.info(f"{folder} is complete: {pictures:,} pictures in {seconds:.0f} s")
        track = partial(track_cache, recipe.tracking, name=recipe.name, teacher=asked)
        context.run_on_main(lambda: track(data=Path(recipe.data.path)))
        return 0


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "cache_logits",
        "Write down what a recipe's teachers with placement: cached say about each view of each "
        "training row. Start it again to go on; a student then learns from the file.",
        "python -m cifar_dist.cache_logits recipes/r18_32_kd_cached.yaml",
        "accelerate launch -m cifar_dist.cache_logits recipes/r18_32_kd_cached.yaml augment.views=16",
    )
    add_recipe(parser, "a student's recipe, see recipes/")
    parser.add_argument(
        "--sharded", action="store_true", help="share the teacher's weights among the processes"
    )
    parser.add_argument(
        "--force", action="store_true", help="begin anew, and replace another cache in its place"
    )
    options = parser.parse_intermixed_args(arguments)

    set_slurm_env()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    cached = [teacher for teacher in recipe.all_teachers if teacher.placement == "cached"]
    if not cached:
        raise UserError(
            f"{options.recipe}: no teacher to cache; add teacher.placement=cached augment.views=8"
        )
    if not (Path(recipe.data.path) / "digest.json").exists():
        raise UserError(
            f"{recipe.data.path} has no data; run `python -m cifar_dist.prepare --output "
            f"{recipe.data.path}`"
        )
    accelerator = init_distributed(
        timeout_seconds=recipe.run.timeout_seconds, threads=recipe.run.threads
    )
    stop = 0
    with propagate_errors(accelerator):
        check_precision(recipe.run.precision, accelerator.device)
        context = DistContext.of(accelerator)
        for asked in cached:
            stop = stop or cache_teacher(
                recipe,
                asked,
                sharded=options.sharded,
                force=options.force,
                context=context,
                device=accelerator.device,
            )
    if stop:
        log.info(f"stopped by {signal.Signals(stop).name}; start it again to go on")
        return signals.STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
