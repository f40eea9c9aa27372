"""A teacher's logits for every view of every training row, on disk: float16 [V, N, C].

A cache is a folder with `logits.npy`, which can be memory-mapped, and `manifest.json` with its
fingerprint and SHA-256. While it is being written it is `FOLDER.part`, with the number of rows that
are safely on disk in `progress.json`; it is renamed when it is complete.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import make_folder, read_json, sha256, sync, with_path, write_json

LOGITS, MANIFEST, PROGRESS = "logits.npy", "manifest.json", "progress.json"
SAVE_SECONDS = 10.0  # at most this much work is lost by a kill or a power cut
CREATE = "run `accelerate launch -m cifar_dist.cache_logits RECIPE` with this recipe"
Fingerprint = Mapping[
    str, Any
]  # everything that determines the logits, as {"augment.seed": 0, ...}


def fingerprint_differences(old: Any, new: Fingerprint) -> str:
    """Return the differences of two fingerprints as `augment.seed: 0 -> 1; ...`, or ""."""
    old = old if isinstance(old, dict) else {}
    return "; ".join(
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def _short(value: Any) -> Any:
    """Abbreviate a SHA-256 to twelve digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _read_record(path: Path) -> dict[str, Any] | None:
    return read_json(path, "create the cache again with --force")


# ----------------------------------------------------------------------------- reading


def check_cache(folder: Path, fingerprint: Fingerprint) -> None:
    """Raise UserError unless the cache is complete, undamaged and has this fingerprint.

    Reads the whole file once, for its SHA-256.
    """
    manifest = _read_record(folder / MANIFEST)
    if manifest is None:
        unfinished = partial_path(folder).exists() and not folder.exists()
        state = "not finished" if unfinished else "no cache of a teacher's logits"
        raise UserError(f"{folder} is {state}; {CREATE}")
    changed = fingerprint_differences(manifest.get("fingerprint"), fingerprint)
    if changed:
        raise UserError(
            f"the cache {folder} was made for something else ({changed}); {CREATE} and "
            "teacher.cache=ANOTHER_FOLDER, or with --force to replace it"
        )
    logits = folder / LOGITS
    if not logits.is_file() or sha256(logits) != manifest.get("sha256"):
        raise UserError(f"{logits} is damaged; create the cache again: {CREATE} and --force")


def open_logits(folder: Path) -> Tensor:
    """Return the logits of a checked cache, float16 [V, N, C], memory-mapped."""
    # "c" (copy on write), as torch warns about read-only arrays
    return torch.from_numpy(numpy.load(folder / LOGITS, mmap_mode="c", allow_pickle=False))


# ----------------------------------------------------------------------------- writing


def partial_path(folder: Path) -> Path:
    """Return the folder of a cache that is not complete yet."""
    return folder.with_name(f"{folder.name}.part")


class CacheWriter:
    """Appends rows of logits in order, and resumes after a kill.

    `shape` is (V, N, C). Another cache in the same folder, complete or not, is a UserError unless
    `force`; a complete one is replaced only when its successor is complete.
    """

    def __init__(
        self, folder: Path, shape: Sequence[int], fingerprint: Fingerprint, *, force: bool
    ) -> None:
        self.folder, self.part = folder, partial_path(folder)
        self.shape, self.fingerprint = tuple(shape), dict(fingerprint)
        self.rows = 0  # written so far, of V * N
        self.is_finished = (folder / MANIFEST).exists() and not force
        if self.is_finished:
            check_cache(folder, fingerprint)
            return
        if folder.exists() and not (folder / MANIFEST).exists():  # never replaced, even with force
            raise UserError(f"{folder} exists but is no cache; choose another teacher.cache=FOLDER")
        if force:
            shutil.rmtree(self.part, ignore_errors=True)
        progress = _read_record(self.part / PROGRESS) or {
            "rows": 0,
            "fingerprint": self.fingerprint,
        }
        changed = fingerprint_differences(progress["fingerprint"], fingerprint)
        if changed:
            raise UserError(
                f"the unfinished cache {self.part} was made for something else ({changed}); replace it "
                "with --force, or choose another folder (teacher.cache=FOLDER)"
            )
        self.rows = progress["rows"]
        with with_path(self.part / LOGITS):
            self.file = self._open()
        self.saved_at = time.monotonic()

    def _open(self) -> BinaryIO:
        """Open the file at the position of the next row."""
        make_folder(self.part)
        file = (self.part / LOGITS).open("r+b" if self.rows else "w+b")
        description = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        numpy.lib.format.write_array_header_1_0(file, description)
        end = file.tell() + self.rows * self.shape[2] * 2
        if file.seek(0, os.SEEK_END) < end:
            raise UserError(
                f"{self.part / LOGITS} is shorter than its progress; start again with --force"
            )
        file.seek(end)
        file.truncate()
        return file

    def append(self, logits: Tensor) -> None:
        """Write float16 [rows, C] from the CPU; sync to disk every SAVE_SECONDS."""
        if not logits.isfinite().all():
            raise UserError(
                f"the teacher's logits from row {self.rows % self.shape[1]} on do not fit float16: "
                "they are not finite or above 65504; check the teacher"
            )
        with with_path(self.part / LOGITS):
            self.file.write(logits.contiguous().numpy().astype("<f2", copy=False).tobytes())
        self.rows += len(logits)
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Sync all rows to disk, then record their number."""
        with with_path(self.part / LOGITS):
            self.file.flush()
            os.fsync(self.file.fileno())
        write_json(self.part / PROGRESS, {"rows": self.rows, "fingerprint": self.fingerprint})
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Write the manifest and rename the folder."""
        assert self.rows == math.prod(self.shape[:2]), "all rows must have been written"
        self.save()
        self.file.close()
        digest = sha256(self.part / LOGITS)
        manifest = {"fingerprint": self.fingerprint, "shape": self.shape, "sha256": digest}
        write_json(self.part / MANIFEST, manifest)
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.rename(self.folder, old)
        os.rename(self.part, self.folder)
        sync(self.folder.parent)
        (self.folder / PROGRESS).unlink()  # last: after a kill before it, finish() runs once more
        shutil.rmtree(old, ignore_errors=True)
