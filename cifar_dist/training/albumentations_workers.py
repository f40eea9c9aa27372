"""The albumentations workers of all ranks on one machine, which fill one shared buffer."""

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
from cifar_dist.utils.process import host_id


class AlbumentationsWorkers:
    """Images of an epoch at a time, for which all ranks wait together."""

    def __init__(self, images: BufferedImages, context: DistContext) -> None:
        self.images, self.context = images, context

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        return self.images(view, rows)

    def wait_for_epoch(self, epoch: int) -> bool:
        """Wait until the images of an epoch are complete. Collective, once per second.

        Returns False if a process received a stop signal: poll first. UserError on all ranks if a
        worker died.
        """
        while True:
            self.context.heartbeat.beat()
            ready = self.context.run_on_all(
                lambda: (self.images.wait_for_epoch(epoch), signals.stop_signal())
            )
            if all(is_ready for is_ready, _ in ready):
                return True
            if any(signal for _, signal in ready):
                return False


@contextmanager
def albumentations_workers(
    config: AugmentConfig, split: Split, context: DistContext, epochs: int
) -> Iterator[AlbumentationsWorkers | None]:
    """Start the workers of the configuration; yields None if it has none."""
    if config.albumentations is None or not config.workers:
        yield None
        return
    transforms, count = config.albumentations, config.workers
    hosts = context.all_gather_object(host_id())
    local_ranks = [rank for rank in range(context.world_size) if hosts[rank] == hosts[context.rank]]
    layout = Layout(
        rows=len(split.labels),
        image_size=split.image_size,
        workers=len(local_ranks) * count,
    )
    first = local_ranks.index(context.rank) * count
    with ExitStack() as stack:
        files: list[int] = []
        started: list[BufferedImages] = []

        def create_buffer() -> str:
            """Create the buffer on the first process of each machine; others open it through /proc."""
            if context.rank != local_ranks[0]:
                return ""
            files.append(stack.enter_context(allocate(layout)).fileno())
            numpy.copyto(layout.pages(files[0])[0], split.images.cpu().numpy())
            return f"/proc/{os.getpid()}/fd/{files[0]}"

        paths = context.run_on_all(create_buffer)

        def start() -> None:
            if not files:
                file = open(paths[local_ranks[0]], "r+b", buffering=0)  # noqa: SIM115
                files.append(stack.enter_context(file).fileno())
            images = BufferedImages(
                transforms,
                file=files[0],
                layout=layout,
                worker_ids=range(first, first + count),
                seed=config.seed,
                view_of_epoch=lambda epoch: config.views_in_epoch(epoch)[0],
                epochs=epochs,
                device=split.images.device,
            )
            stack.callback(images.close)
            started.append(images)

        context.run_on_all(start)
        yield AlbumentationsWorkers(started[0], context)
