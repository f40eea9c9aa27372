"""The workers of `augment.albumentations` under many processes: one buffer a machine, one word when one dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy
from torch import Tensor

from cifar_dist.data.augment.albumentations_buffer import BufferedImages
from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.augment.shared_memory import Layout, allocate
from cifar_dist.data.dataset import Split
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext
from cifar_dist.utils.host import host_id


class AlbumentationsWorkers:
    """Host pictures that all ranks show together, by calling `show`."""

    def __init__(self, pictures: BufferedImages, context: DistContext) -> None:
        self.images, self.context = pictures, context

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        return self.images(view, rows)

    def wait_for_epoch(self, epoch: int) -> bool:
        """Wait for an epoch's pictures and see that all workers live; all look up once a second.

        False: some process is asked to stop, so vote first. UserError on all ranks for a dead worker.
        """
        while True:
            self.context.heartbeat.beat()
            seen = self.context.run_on_all(
                lambda: (self.images.wait_for_epoch(epoch), signals.stop_signal())
            )
            if all(shown for shown, _ in seen):
                return True
            if any(number for _, number in seen):
                return False


@contextmanager
def albumentations_workers(
    config: AugmentConfig, split: Split, context: DistContext, epochs: int
) -> Iterator[AlbumentationsWorkers | None]:
    """The workers that the configuration asks for, ready to fill; None where it asks for none."""
    if config.albumentations is None or not config.workers:
        yield None
        return
    transforms, count = config.albumentations, config.workers
    machines = context.all_gather_object(host_id())
    here = [rank for rank in range(context.world_size) if machines[rank] == machines[context.rank]]
    layout = Layout(rows=len(split.labels), workers=len(here) * count)
    first = here.index(context.rank) * count
    with ExitStack() as stack:
        files: list[int] = []
        started: list[BufferedImages] = []

        def make() -> str:
            """The first process of a machine makes the file, which others find among its open ones."""
            if context.rank != here[0]:
                return ""
            files.append(stack.enter_context(allocate(layout)).fileno())
            numpy.copyto(layout.pages(files[0])[0], split.images.cpu().numpy())
            return f"/proc/{os.getpid()}/fd/{files[0]}"

        paths = context.run_on_all(make)

        def start() -> None:
            if not files:
                file = open(paths[here[0]], "r+b", buffering=0)  # noqa: SIM115
                files.append(stack.enter_context(file).fileno())
            pictures = BufferedImages(
                transforms,
                file=files[0],
                layout=layout,
                mine=range(first, first + count),
                seed=config.seed,
                view_of=lambda epoch: config.views_in_epoch(epoch)[0],
                epochs=epochs,
                device=split.images.device,
            )
            stack.callback(pictures.close)
            started.append(pictures)

        context.run_on_all(start)
        yield AlbumentationsWorkers(started[0], context)
