"""Prefetch images for `data.place: host`, where a split's images stay on the CPU.

The rows of a step, mixing partners included, are a pure function of the step number. A thread runs a
few steps ahead: it gathers a step's rows from the memory-mapped file (into pinned memory for a GPU)
and copies them on a separate CUDA stream. The device waits for the copy; the host does not.
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

PREFETCH_STEPS = 3


@dataclass(frozen=True)
class PrefetchedImages:
    """The images of one step, in the order in which they are requested."""

    requests: Sequence[Tensor]  # int64 [B] each, rows on the CPU
    images: Tensor  # uint8 [total rows, 3, S, S] on the device
    parts: Sequence[Tensor]  # `images` split by request
    copied: torch.cuda.Event | None  # recorded after the copy to a GPU


class StreamedImages:
    """Return the images of each step's rows, which must be requested in the order of `steps`."""

    def __init__(self, split: Split, steps: Iterator[Sequence[Tensor]]) -> None:
        self.images, self.device, self.steps = split.images, split.labels.device, steps
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # A new thread would otherwise create a context on the first GPU, which may not be this rank's.
        set_device = partial(torch.cuda.set_device, self.stream.device) if self.stream else None
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=set_device)
        self.pending = deque(self.thread.submit(self.fetch) for _ in range(PREFETCH_STEPS))
        self.ready: deque[tuple[Tensor, Tensor]] = deque()  # rows and images of the current step

    def fetch(self) -> PrefetchedImages:
        """Return the images of the next step; runs in the thread."""
        requests = next(self.steps)
        rows = torch.cat(list(requests))
        with torch.cuda.stream(self.stream):  # None leaves the current stream
            gathered = torch.empty(
                (len(rows), *self.images.shape[1:]),
                dtype=torch.uint8,
                pin_memory=self.stream is not None,
            )
            torch.index_select(self.images, 0, rows, out=gathered)
            images = gathered.to(self.device, non_blocking=True)
        copied = self.stream.record_event() if self.stream else None
        parts = images.split([len(request) for request in requests])
        return PrefetchedImages(requests, images, parts, copied)

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        """Return the images of `rows`; raise any error of the thread here."""
        if not self.ready:
            step = self.pending.popleft().result()
            self.pending.append(self.thread.submit(self.fetch))
            if step.copied:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(step.copied)
                step.images.record_stream(current)  # allocated on the copy stream
            self.ready.extend(zip(step.requests, step.parts, strict=True))
        expected, images = self.ready.popleft()
        # Comparing rows on a GPU would synchronize with it.
        assert rows.device.type != "cpu" or torch.equal(rows, expected), "requested out of order"
        return images

    def close(self) -> None:
        """Stop the thread once its current fetch is done."""
        self.thread.shutdown(cancel_futures=True)


def rows_per_step(
    config: AugmentConfig, batches: Iterator[list[Batch]], partners: Tensor
) -> Iterator[list[Tensor]]:
    """Yield the rows whose images `Augment` requests in each step, in its order, on the CPU."""
    views: list[int] = []
    for batch in map(concatenate, batches):
        requests = [batch.rows]
        if config.uses_mixing:
            if config.views_in_epoch(batch.epoch) != views:
                views = config.views_in_epoch(batch.epoch)
                mixing = draw_mix_tables(
                    config,
                    views,
                    num_images=len(batch.split.labels),
                    image_size=batch.split.image_size,
                    partners=partners,
                )
            requests.append(mixing.partner.index_select(0, batch.table_index))
        yield requests


@contextmanager
def stream_images(
    config: AugmentConfig,
    split: Split,
    partners: Tensor,
    make_batches: Callable[[Split], Iterator[list[Batch]]],
) -> Iterator[StreamedImages | None]:
    """Prefetch the images of the batches of `make_batches`.

    Yields None for a split on the device and under `augment.albumentations`.
    """
    if not split.on_host or config.albumentations:
        yield None
        return
    batches = make_batches(replace(split, labels=split.labels.cpu()))
    images = StreamedImages(split, rows_per_step(config, batches, partners))
    try:
        yield images
    finally:
        images.close()
