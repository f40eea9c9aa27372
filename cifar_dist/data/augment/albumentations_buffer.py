"""Images of an albumentations pipeline, computed on demand or by workers an epoch ahead.

Both give the same images, because an image is a pure function of (augment.seed, view, row).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Protocol

import numpy
import torch
from torch import Tensor

from cifar_dist.data.augment.albumentations_pipeline import Pipeline, Transforms
from cifar_dist.data.augment.albumentations_worker import READY
from cifar_dist.data.augment.shared_memory import Layout
from cifar_dist.data.dataset import Split
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.random import derive_seed

WAIT_SECONDS, POLL_SECONDS = 1.0, 0.005
WORKER = "import sys; sys.path[:] = {}; from cifar_dist.data.augment.albumentations_worker import main; sys.exit(main())"


class ImageSource(Protocol):
    """Interface of a source of images for the augmentation on the device."""

    def __call__(self, view: int, rows: Tensor) -> Tensor: ...  # uint8 [B, 3, S, S]


def view_seed(seed: int, view: int) -> int:
    """Return the seed of a view; with a row, it is the key of an image."""
    return derive_seed("host", seed, view)


class InlineImages:
    """Computes images on demand in this process."""

    def __init__(self, transforms: Transforms, split: Split, *, seed: int) -> None:
        self.pipeline, self.seed = Pipeline(transforms, image_size=split.image_size), seed
        self.images, self.device = split.images.cpu().numpy(), split.labels.device

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        seed = view_seed(self.seed, view)
        images = [self.pipeline(self.images[row], seed, row) for row in rows.tolist()]
        return torch.from_numpy(numpy.stack(images)).to(self.device)


class BufferedImages:
    """Reads images from two shared slots that workers fill, each with the view of one epoch.

    `worker_ids` are the workers of this process. They fill the slot of the next epoch during this one.
    """

    def __init__(
        self,
        transforms: Transforms,
        *,
        file: int,
        layout: Layout,
        worker_ids: range,
        seed: int,
        view_of_epoch: Callable[[int], int],
        epochs: int,
        device: torch.device,
    ) -> None:
        self.file, self.layout, self.device = file, layout, device
        self.seed, self.view_of_epoch, self.epochs = seed, view_of_epoch, epochs
        self.slots = [torch.from_numpy(slot) for slot in layout.pages(file)[1:]]
        self.epoch = self.requested_epoch = -1
        self.images: Tensor | None = None  # of the current epoch
        self.workers: list[subprocess.Popen[str]] = []
        try:
            for worker in worker_ids:
                self.workers.append(start_worker(transforms, file, layout, worker))
            for process in self.workers:
                assert process.stdout
                if process.stdout.readline() != READY:
                    process.wait()
                    self.check()
        except BaseException:
            self.close()
            raise

    def request(self, epoch: int) -> None:
        """Request an epoch's slot from the workers, once per epoch."""
        if epoch == self.requested_epoch or epoch >= self.epochs:
            return
        self.requested_epoch = epoch
        view = self.view_of_epoch(epoch)
        line = json.dumps([epoch % 2, view, view_seed(self.seed, view)])
        for process in self.workers:
            assert process.stdin
            with suppress(BrokenPipeError):  # the next check reports the dead worker
                process.stdin.write(f"{line}\n")
                process.stdin.flush()

    def wait_for_epoch(self, epoch: int) -> bool:
        """Switch to an epoch and return True, or return False if its slot is not full after a second.

        No process of the machine may still read images of an earlier epoch. Raises UserError if a
        worker has died.
        """
        self.check()
        if epoch == self.epoch:
            return True
        self.request(epoch)
        slot, view = epoch % 2, self.view_of_epoch(epoch)
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.layout.is_full(self.file, slot, view):
            self.check()
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        if self.device.type == "cpu":
            self.images = self.slots[slot]
        else:
            if self.images is None:
                self.images = torch.empty_like(self.slots[slot], device=self.device)
            self.images.copy_(self.slots[slot])
        self.epoch = epoch
        return True

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        assert self.images is not None, "wait_for_epoch comes first"
        assert view == self.view_of_epoch(self.epoch), "only the current epoch has images"
        self.request(self.epoch + 1)  # all processes are in this epoch: the other slot is free
        return self.images.index_select(0, rows)

    def check(self) -> None:
        """Raise UserError if a worker of this process has ended."""
        for process in self.workers:
            code = process.poll()
            if code is not None:
                assert process.stdout
                reason = process.stdout.read().strip()
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise UserError(
                    reason
                    or f"worker process {process.pid} of augment.albumentations ended with {how}; if memory "
                    "is short, use fewer workers (augment.workers=1); run the command again to resume"
                )

    def close(self) -> None:
        """Kill the workers; they hold no state."""
        for process in self.workers:
            process.kill()
        for process in self.workers:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with suppress(BrokenPipeError):
                    pipe.close()


def start_worker(
    transforms: Transforms, file: int, layout: Layout, worker: int
) -> subprocess.Popen[str]:
    """Start a worker process; it inherits a mask that blocks stop signals from the beginning."""
    previous_mask = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[file],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    spec = {
        "pipeline": transforms,
        "layout": asdict(layout),
        "file": file,
        "worker": worker,
        "parent": os.getpid(),
    }
    assert process.stdin
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(spec) + "\n")
        process.stdin.flush()
    return process
