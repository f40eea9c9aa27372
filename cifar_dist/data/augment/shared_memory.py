"""Floor 1. The file that the processes of a machine share under `augment.albumentations`: it never has a name.

[which view each worker has put into each slot][all pictures as they are][slot 0][slot 1]

A file without a name goes with its last process, however that ends. Pictures are read and written
through a map of it, and what is filled is told by system calls, which also order the memory.
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
IMAGE_BYTES = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class Layout:
    rows: int
    workers: int  # of all processes of this machine

    @property
    def head(self) -> int:
        """Bytes before the pictures; whole pages."""
        return -(-16 * self.workers // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        return self.head + 3 * self.rows * 3072

    def rows_of(self, worker: int) -> range:
        """The rows that a worker fills."""
        return range(self.rows * worker // self.workers, self.rows * (worker + 1) // self.workers)

    def pages(self, file: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The source and the two slots, uint8 [N, 3, 32, 32] each."""
        pages = mmap.mmap(file, self.size)
        pictures = numpy.frombuffer(pages, numpy.uint8, offset=self.head)
        source, first, second = pictures.reshape(3, self.rows, *IMAGE_BYTES)
        return source, first, second

    def tell(self, file: int, slot: int, worker: int, view: int) -> None:
        """Say that this worker's rows of the view are in the slot."""
        told = numpy.int64(view + 1).tobytes()
        os.pwrite(file, told, 8 * (slot * self.workers + worker))

    def is_full(self, file: int, slot: int, view: int) -> bool:
        """Whether all rows of the view are in the slot."""
        told = os.pread(file, 8 * self.workers, 8 * slot * self.workers)
        return bool((numpy.frombuffer(told, numpy.int64) == view + 1).all())


def allocate(layout: Layout) -> BinaryIO:
    """A file without a name for so many pictures, in memory if there is room, else on disk."""
    folders = [folder for folder in (SHARED_MEMORY, *_temporary()) if Path(folder).is_dir()]
    for folder in folders:
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as the run
        except OSError:
            continue  # nobody may write there
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
        f"augment.albumentations needs {layout.size / 2**20:,.0f} MiB in {' or '.join(folders) or SHARED_MEMORY}, "
        "where there is no room; free some, set TMPDIR to another folder, or augment.workers=0"
    )


def _temporary() -> list[str]:
    """The folder for temporary files, where the machine has one."""
    try:
        return [tempfile.gettempdir()]
    except FileNotFoundError:
        return []
