"""Compute and store a teacher's logits for every view of every training row.

Ranks compute consecutive blocks of rows, and rank 0 appends them in order. A killed job therefore
loses only seconds of work, and the file has the same bytes for any number of processes.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.training_rows import select_rows
from cifar_dist.distill.logit_cache import CacheWriter
from cifar_dist.distill.teacher import OnlineTeacher, TeacherConfig, build_online_teacher
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext, rank_mesh
from cifar_dist.distributed.ddp import gather_blocks
from cifar_dist.evaluation.evaluator import BLOCK_SIZE
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.teachers import cache_fingerprint, check_teacher, find_teacher
from cifar_dist.training.lock import run_lock
from cifar_dist.utils.log import log, progress_bar
from cifar_dist.utils.precision import autocast

Block = tuple[int, int, int]  # view, first row, number of rows


def remaining_blocks(done: int, *, views: int, rows: int) -> list[Block]:
    """Return the blocks that follow the first `done` of views * rows images, in file order."""
    return [
        (view, start, min(BLOCK_SIZE, rows - start))
        for view in range(views)
        for start in range(0, rows, BLOCK_SIZE)
        if view * rows + start >= done
    ]


class TeacherRunner:
    """Compute the teacher's logits of a block; keeps the augmentation tables of the last view."""

    def __init__(self, recipe: Recipe, split: Split, teacher: OnlineTeacher) -> None:
        self.recipe, self.split, self.teacher = recipe, split, teacher
        rows, _ = select_rows(recipe.data, split.labels)
        self.augment = Augment(recipe.augment, split, rows)

    def __call__(self, block: Block) -> Tensor:
        """Return float16 [BLOCK_SIZE, C], padded with zeros."""
        view, first, count = block
        if self.augment.view_id != view:
            self.augment = self.augment.clone(view_id=view)
        device = self.split.labels.device
        rows = torch.arange(first, first + count, device=device)
        batch = gather_batch(self.split, rows, epoch=0, micro_batch=0)
        with autocast(self.recipe.run.precision, device):
            logits = self.teacher(self.augment(batch), batch)
        return nn.functional.pad(logits.half(), (0, 0, 0, BLOCK_SIZE - count))


def cache_teacher(
    recipe: Recipe,
    teacher: TeacherConfig,
    *,
    sharded: bool,
    force: bool,
    context: DistContext,
    device: torch.device,
) -> int:
    """Create or complete the cache of one teacher; return 0, or the stop signal that interrupted it."""
    folder = teacher.cache_folder
    with ExitStack() as stack:
        lock = run_lock(folder, folder.with_name(f"{folder.name}.lock"), remedy="teacher.cache=...")
        context.run_on_main(lambda: stack.enter_context(lock))
        weights = context.run_on_main(find_teacher, teacher)
        context.run_on_main(
            check_teacher, teacher, weights, Path(recipe.data.path), recipe.data.labels
        )
        fingerprint = context.run_on_main(cache_fingerprint, recipe, weights)
        views, rows, num_classes = fingerprint["shape"]
        total = views * rows
        writers: list[CacheWriter] = []  # one on rank 0, none elsewhere

        def open_cache() -> tuple[int, bool]:
            writers.append(CacheWriter(folder, fingerprint["shape"], fingerprint, force=force))
            return writers[0].rows, writers[0].is_finished

        def append(logits: Tensor) -> None:
            writers[0].append(logits)

        done, finished = context.run_on_main(open_cache)
        if finished:
            log.info(f"{folder} is complete: {views} views of {rows:,} rows")
            return 0

        data = Path(recipe.data.path)
        split = load_split(data, "train", device, recipe.data.place, recipe.data.labels)
        mesh = rank_mesh(device, context.world_size, over=teacher.shard_over) if sharded else None
        runner = TeacherRunner(
            recipe, split, build_online_teacher(teacher, weights, num_classes, device, mesh)
        )
        log.info(
            f"{folder}: {views} views of {rows:,} rows, {total * num_classes * 2 / 2**20:,.0f} MiB"
            + (f"; resuming after {done:,} of {total:,} images" if done else "")
        )
        bar = stack.enter_context(progress_bar(done, total, enabled=context.is_main, unit="image"))
        blocks, started = remaining_blocks(done, views=views, rows=rows), time.perf_counter()
        for first in range(0, len(blocks), context.world_size):
            # Ranks without a block repeat the last one: a sharded teacher needs every rank.
            logits = runner(blocks[min(first + context.rank, len(blocks) - 1)])
            gathered = gather_blocks(logits[None], context).cpu()  # [W, BLOCK_SIZE, C]
            counts = [count for _, _, count in blocks[first : first + context.world_size]]
            unpadded = torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)])
            context.run_on_main(append, unpadded)
            bar.update(sum(counts))
            stop = int(context.all_reduce_max([signals.stop_signal()])[0])
            if stop:
                context.run_on_main(lambda: writers[0].save())
                return stop
        context.run_on_main(lambda: writers[0].finish())
        seconds = time.perf_counter() - started
        log.info(f"{folder} is complete: {total - done:,} images in {seconds:.0f} s")
        return 0
