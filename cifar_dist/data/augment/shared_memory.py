"""The buffer that the processes of a machine share for `augment.albumentations`: an unnamed file.

Layout: [view that each worker has written to each slot][all source images][slot 0][slot 1]

The system frees an unnamed file when its last process ends, even after a crash. Images are accessed
through a memory map. The header is accessed by system calls, which also order the memory accesses.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from cifar_dist.utils.errors import UserError

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True)
class Layout:
    rows: int
    image_size: int  # S
    workers: int  # of all processes of the machine

    @property
    def header_bytes(self) -> int:
        """Return the size of the header, rounded up to whole pages."""
        return -(-16 * self.workers // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        return self.header_bytes + 3 * self.rows * 3 * self.image_size**2

    def rows_of(self, worker: int) -> range:
        """Return the rows that a worker fills."""
        return range(self.rows * worker // self.workers, self.rows * (worker + 1) // self.workers)

    def pages(self, file: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Map the source images and the two slots, uint8 [N, 3, S, S] each."""
        pages = mmap.mmap(file, self.size)
        images = numpy.frombuffer(pages, numpy.uint8, offset=self.header_bytes)
        source, first, second = images.reshape(3, self.rows, 3, self.image_size, self.image_size)
        return source, first, second

    def mark_filled(self, file: int, slot: int, worker: int, view: int) -> None:
        """Record that the slot contains this worker's rows of the view."""
        entry = numpy.int64(view + 1).tobytes()
        os.pwrite(file, entry, 8 * (slot * self.workers + worker))

    def is_full(self, file: int, slot: int, view: int) -> bool:
        """Return whether the slot contains all rows of the view."""
        entries = os.pread(file, 8 * self.workers, 8 * slot * self.workers)
        return bool((numpy.frombuffer(entries, numpy.int64) == view + 1).all())


def allocate(layout: Layout) -> BinaryIO:
    """Create the unnamed file, in memory if there is space, otherwise in the temporary folder."""
    folders = [folder for folder in (SHARED_MEMORY, *_temp_folder()) if Path(folder).is_dir()]
    for folder in folders:
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open until the run ends
        except OSError:
            continue  # not writable
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, layout.size)
            else:
                file.truncate(layout.size)
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
                raise
        else:
            return file
    raise UserError(
        f"augment.albumentations: not enough space for {layout.size / 2**20:,.0f} MiB in "
        f"{' or '.join(folders) or SHARED_MEMORY}; free some space, set TMPDIR to another folder, or set "
        "augment.workers=0"
    )


def _temp_folder() -> list[str]:
    try:
        return [tempfile.gettempdir()]
    except FileNotFoundError:
        return []
