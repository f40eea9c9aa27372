"""Floor 1. `data.place: host`: pictures that are on their way to the device before a step asks for them.

Which rows a step shows is a pure function of its number, partners included. So a thread is some steps
ahead: it gathers a step's rows from the file's pages as one piece, on a GPU into pinned memory, and
copies that on a stream of its own. The step waits for the copy on the device, not on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.augment.tables import draw_mix_tables
from cifar_dist.data.batches import Batch, concatenate
from cifar_dist.data.dataset import Split

PREFETCH_STEPS = 3  # steps


@dataclass(frozen=True)
class PrefetchedImages:
    """A step's pictures, in the order in which they will be taken."""

    rows: Sequence[Tensor]  # int64 [B] each, on the CPU
    pictures: Tensor  # uint8 [all of them, 3, 32, 32] on the device
    parts: Sequence[Tensor]  # of the pictures, one for each of the rows
    copied: torch.cuda.Event | None  # on a GPU: when they are there


class StreamedImages:
    """The pictures of each step's rows, int64 on the CPU, which have to be taken in this order."""

    def __init__(self, split: Split, steps: Iterator[Sequence[Tensor]]) -> None:
        self.images, self.device, self.steps = split.images, split.labels.device, steps
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # A new thread is on the first GPU, whichever is the rank's, and would open it.
        begin = partial(torch.cuda.set_device, self.stream.device) if self.stream else None
        self.thread = ThreadPoolExecutor(1, "pictures", initializer=begin)
        self.coming = deque(self.thread.submit(self.fetch) for _ in range(PREFETCH_STEPS))
        self.here: deque[tuple[Tensor, Tensor]] = deque()  # rows and pictures of this step

    def fetch(self) -> PrefetchedImages:
        """The next step's pictures, by the thread."""
        rows = next(self.steps)
        together, shape = torch.cat(list(rows)), self.images.shape[1:]
        with torch.cuda.stream(self.stream):  # None: nothing changes
            gathered = torch.empty(
                (len(together), *shape), dtype=torch.uint8, pin_memory=self.stream is not None
            )
            torch.index_select(self.images, 0, together, out=gathered)
            pictures = gathered.to(self.device, non_blocking=True)
        copied = self.stream.record_event() if self.stream else None
        return PrefetchedImages(
            rows, pictures, pictures.split([len(part) for part in rows]), copied
        )

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        """Raises what went wrong in the thread."""
        if not self.here:
            fetched = self.coming.popleft().result()
            self.coming.append(self.thread.submit(self.fetch))
            if fetched.copied:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(fetched.copied)
                fetched.pictures.record_stream(here)  # whose memory was the other stream's
            self.here.extend(zip(fetched.rows, fetched.parts, strict=True))
        expected, pictures = self.here.popleft()
        # On a GPU to compare them would be to wait.
        assert rows.device.type != "cpu" or torch.equal(rows, expected), "taken in another order"
        return pictures

    def close(self) -> None:
        """End the thread, after what it is doing right now."""
        self.thread.shutdown(cancel_futures=True)


def rows_in_order(
    config: AugmentConfig, batches: Iterator[list[Batch]], partners: Tensor
) -> Iterator[list[Tensor]]:
    """For each step the rows whose pictures `Augment` takes, in its order; all on the CPU."""
    views: list[int] = []
    for batch in map(concatenate, batches):
        if config.uses_mixing and config.views_in_epoch(batch.epoch) != views:
            views = config.views_in_epoch(batch.epoch)
            size = len(batch.split.labels)
            mixes = draw_mix_tables(config, views, num_images=size, partners=partners)
        taken = [batch.rows]
        if config.uses_mixing:
            taken.append(mixes.partner.index_select(0, batch.table_index))
        yield taken


@contextmanager
def stream_images(
    config: AugmentConfig,
    split: Split,
    partners: Tensor,
    batches_of: Callable[[Split], Iterator[list[Batch]]],
) -> Iterator[StreamedImages | None]:
    """The pictures of the plan `batches_of`; None for a split on the device, or under `augment.albumentations`."""
    if not split.on_host or config.albumentations:
        yield None
        return
    batches = batches_of(replace(split, labels=split.labels.cpu()))
    pictures = StreamedImages(split, rows_in_order(config, batches, partners))
    try:
        yield pictures
    finally:
        pictures.close()
