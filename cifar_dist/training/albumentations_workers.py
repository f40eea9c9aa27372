"""The workers of `augment.host` under many processes: one buffer a machine, one word when one dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy
from torch import Tensor

from cifar_dist.data.augment.albumentations_buffer import Ahead
from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.augment.shared_memory import Layout, allocate
from cifar_dist.data.dataset import Split
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import Ranks
from cifar_dist.utils.host import machine


class HostWorkers:
    """Host pictures that all ranks show together, by calling `show`."""

    def __init__(self, pictures: Ahead, ranks: Ranks) -> None:
        self.pictures, self.ranks = pictures, ranks

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        return self.pictures(view, rows)

    def show(self, epoch: int) -> bool:
        """Wait for an epoch's pictures and see that all workers live; all look up once a second.

        False: some process is asked to stop, so vote first. UserError on all ranks for a dead worker.
        """
        while True:
            self.ranks.pulse.beat()
            seen = self.ranks.together(lambda: (self.pictures.show(epoch), signals.received()))
            if all(shown for shown, _ in seen):
                return True
            if any(number for _, number in seen):
                return False


@contextmanager
def host_workers(
    config: AugmentConfig, split: Split, ranks: Ranks, epochs: int
) -> Iterator[HostWorkers | None]:
    """The workers that the configuration asks for, ready to fill; None where it asks for none."""
    if config.host is None or not config.host_workers:
        yield None
        return
    transforms, count = config.host, config.host_workers
    machines = ranks.each(machine())
    here = [rank for rank in range(ranks.world_size) if machines[rank] == machines[ranks.rank]]
    layout = Layout(rows=len(split.labels), workers=len(here) * count)
    first = here.index(ranks.rank) * count
    with ExitStack() as stack:
        files: list[int] = []
        started: list[Ahead] = []

        def make() -> str:
            """The first process of a machine makes the file, which others find among its open ones."""
            if ranks.rank != here[0]:
                return ""
            files.append(stack.enter_context(allocate(layout)).fileno())
            numpy.copyto(layout.pages(files[0])[0], split.images.cpu().numpy())
            return f"/proc/{os.getpid()}/fd/{files[0]}"

        paths = ranks.together(make)

        def start() -> None:
            if not files:
                file = open(paths[here[0]], "r+b", buffering=0)  # noqa: SIM115
                files.append(stack.enter_context(file).fileno())
            pictures = Ahead(
                transforms,
                file=files[0],
                layout=layout,
                mine=range(first, first + count),
                seed=config.seed,
                view_of=lambda epoch: config.shown(epoch)[0],
                epochs=epochs,
                device=split.images.device,
            )
            stack.callback(pictures.close)
            started.append(pictures)

        ranks.together(start)
        yield HostWorkers(started[0], ranks)
