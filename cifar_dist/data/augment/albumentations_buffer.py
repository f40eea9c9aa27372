"""Floor 1. What `augment.albumentations` makes of the rows: here and now, or by workers an epoch ahead.

Either way a picture is a pure function of (augment.seed, view, row), so both give the same ones.
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
    """The pictures of a view before the device's own augmentation."""

    def __call__(self, view: int, rows: Tensor) -> Tensor: ...  # uint8 [B, 3, 32, 32]


def view_seed(seed: int, view: int) -> int:
    """With a row, the key of a picture."""
    return derive_seed("host", seed, view)


class InlineImages:
    """Makes pictures when they are asked for, in this process."""

    def __init__(self, transforms: Transforms, split: Split, *, seed: int) -> None:
        self.pipeline, self.seed = Pipeline(transforms), seed
        self.images, self.device = split.images.cpu().numpy(), split.labels.device

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        seed = view_seed(self.seed, view)
        made = [self.pipeline(self.images[row], seed, row) for row in rows.tolist()]
        return torch.from_numpy(numpy.stack(made)).to(self.device)


class BufferedImages:
    """Takes pictures from slots of shared pages, which workers fill; a slot is an epoch's view.

    `mine` are the workers of this process. While an epoch is shown they fill the next one's slot.
    """

    def __init__(
        self,
        transforms: Transforms,
        *,
        file: int,
        layout: Layout,
        mine: range,
        seed: int,
        view_of: Callable[[int], int],
        epochs: int,
        device: torch.device,
    ) -> None:
        self.file, self.layout, self.device = file, layout, device
        self.seed, self.view_of, self.epochs = seed, view_of, epochs
        self.slots = [torch.from_numpy(slot) for slot in layout.pages(file)[1:]]
        self.epoch = self.asked = -1  # the one shown, the last that workers were told to fill
        self.shown: Tensor | None = None
        self.workers: list[subprocess.Popen[str]] = []
        try:
            for worker in mine:
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
        """Have the workers fill an epoch's slot, if that is not asked yet."""
        if epoch == self.asked or epoch >= self.epochs:
            return
        self.asked = epoch
        view = self.view_of(epoch)
        line = json.dumps([epoch % 2, view, view_seed(self.seed, view)])
        for process in self.workers:
            assert process.stdin
            with suppress(BrokenPipeError):  # the next check says so
                process.stdin.write(f"{line}\n")
                process.stdin.flush()

    def wait_for_epoch(self, epoch: int) -> bool:
        """Show an epoch from now on, if its slot is full within a second; UserError for a dead worker.

        No process of the machine may still take pictures of an earlier epoch.
        """
        self.check()
        if epoch == self.epoch:
            return True
        self.request(epoch)
        slot, view = epoch % 2, self.view_of(epoch)
        until = time.monotonic() + WAIT_SECONDS
        while not self.layout.is_full(self.file, slot, view):
            self.check()
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        if self.device.type == "cpu":
            self.shown = self.slots[slot]
        else:
            if self.shown is None:
                self.shown = torch.empty_like(self.slots[slot], device=self.device)
            self.shown.copy_(self.slots[slot])
        self.epoch = epoch
        return True

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        assert self.shown is not None, "an epoch is shown before its pictures are taken"
        assert view == self.view_of(self.epoch), "pictures are those of the epoch that is shown"
        self.request(self.epoch + 1)  # all processes show this epoch now: the other slot is free
        return self.shown.index_select(0, rows)

    def check(self) -> None:
        """UserError when a worker of this process has ended."""
        for process in self.workers:
            code = process.poll()
            if code is not None:
                assert process.stdout
                reason = process.stdout.read().strip()
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise UserError(
                    reason
                    or f"worker process {process.pid} of augment.albumentations ended with {how}; if memory is "
                    "short, use fewer (augment.workers=1), then start it again to go on"
                )

    def close(self) -> None:
        """End the workers; they hold nothing that anybody needs."""
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
    """An interpreter of its own, deaf to stop signals from its first moment on: it inherits the mask."""
    before = signal.pthread_sigmask(
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
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    spec = {
        "pipeline": transforms,
        "layout": {"rows": layout.rows, "workers": layout.workers},
        "file": file,
        "worker": worker,
        "parent": os.getpid(),
    }
    assert process.stdin
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(spec) + "\n")
        process.stdin.flush()
    return process
