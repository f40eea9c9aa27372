"""A teacher's logits for every view of every training row, on disk: float16 [V, N, C].

A cache is a folder: `logits.npy`, which can be memory-mapped, and `manifest.json`, which says what
it was made of and its SHA-256. While it is being made it is `FOLDER.part`, where `progress.json`
says how many rows are safe; the last step gives it its name.
"""

from __future__ import annotations

import json
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
from cifar_dist.utils.files import make_folder, sha256, sync, write_json

LOGITS, MANIFEST, PROGRESS = "logits.npy", "manifest.json", "progress.json"
SAFE_SECONDS = 10.0  # how much work a kill or a power cut may cost
REMEDY = "run `accelerate launch -m cifar_dist.cache_logits RECIPE` with this recipe"
Fingerprint = Mapping[str, Any]  # all that decides the logits, as {"augment.seed": 0, ...}


def fingerprint_differences(found: Any, wanted: Fingerprint) -> str:
    """How a cache's `made_of` differs from the wanted one: `augment.seed: 0 -> 1; ...`, or ""."""
    found = found if isinstance(found, dict) else {}
    return "; ".join(
        f"{name}: {short(found.get(name))} -> {short(wanted.get(name))}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    )


def short(value: Any) -> Any:
    """A digest's first twelve digits, any other value as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def read_record(path: Path) -> dict[str, Any] | None:
    """What a manifest or progress file says, None where there is none; UserError for a damaged one."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; make the cache again with --force")
    return record


# ----------------------------------------------------------------------------- in training


def check_cache(folder: Path, fingerprint: Fingerprint) -> None:
    """Refuse a cache that is absent, unfinished, damaged, or made of anything but `made_of`.

    Reads all of it once, for the SHA-256.
    """
    manifest = read_record(folder / MANIFEST)
    if manifest is None:
        unfinished = partial_path(folder).exists() and not folder.exists()
        state = "not finished" if unfinished else "no cache of a teacher's logits"
        raise UserError(f"{folder} is {state}; {REMEDY}")
    changed = fingerprint_differences(manifest.get("fingerprint"), fingerprint)
    if changed:
        raise UserError(
            f"the cache {folder} was made for something else ({changed}); {REMEDY} and "
            "teacher.cache=ANOTHER_FOLDER, or with --force to replace it"
        )
    logits = folder / LOGITS
    if not logits.is_file() or sha256(logits) != manifest.get("sha256"):
        raise UserError(f"{logits} is damaged; make the cache again: {REMEDY} and --force")


def open_logits(folder: Path) -> Tensor:
    """The logits of a cache that was checked: float16 [V, N, C] over the mapped file."""
    # "c", copy on write: torch warns of arrays that cannot be written to; nobody writes to this one
    return torch.from_numpy(numpy.load(folder / LOGITS, mmap_mode="c", allow_pickle=False))


# ----------------------------------------------------------------------------- being made


def partial_path(folder: Path) -> Path:
    """Where a cache lies until it is complete."""
    return folder.with_name(f"{folder.name}.part")


class CacheWriter:
    """Appends rows of logits in their order, and goes on where a kill left them.

    `shape` is (V, N, C). A cache of another kind in the way, begun or complete, is refused unless
    `force`; a complete one gives way only to its complete successor.
    """

    def __init__(
        self, folder: Path, shape: Sequence[int], fingerprint: Fingerprint, *, force: bool
    ) -> None:
        self.folder, self.part = folder, partial_path(folder)
        self.shape, self.fingerprint = tuple(shape), dict(fingerprint)
        self.rows = 0  # of the V * N that are written
        self.is_finished = (folder / MANIFEST).exists() and not force
        if self.is_finished:
            check_cache(folder, fingerprint)
            return
        if folder.exists() and not (folder / MANIFEST).exists():  # forced or not: it is not ours
            raise UserError(f"{folder} is there but no cache; choose another teacher.cache=FOLDER")
        if force:
            shutil.rmtree(self.part, ignore_errors=True)
        progress = read_record(self.part / PROGRESS) or {"rows": 0, "fingerprint": self.fingerprint}
        changed = fingerprint_differences(progress["fingerprint"], fingerprint)
        if changed:
            raise UserError(
                f"{self.part} was begun for something else ({changed}); replace it with --force, or "
                "give this one another folder (teacher.cache=FOLDER)"
            )
        self.rows = progress["rows"]
        self.file = self.open()
        self.saved_at = time.monotonic()

    def open(self) -> BinaryIO:
        """The file, at the place where the next row belongs."""
        make_folder(self.part)
        file = (self.part / LOGITS).open("r+b" if self.rows else "w+b")
        description = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        numpy.lib.format.write_array_header_1_0(file, description)
        end = file.tell() + self.rows * self.shape[2] * 2
        if file.seek(0, os.SEEK_END) < end:
            raise UserError(f"{self.part / LOGITS} was cut; begin again with --force")
        file.seek(end)
        file.truncate()
        return file

    def append(self, logits: Tensor) -> None:
        """Write float16 [rows, C] on the CPU; every ten seconds what is written is made safe."""
        if not logits.isfinite().all():
            raise UserError(
                f"the teacher's logits for row {self.rows % self.shape[1]} and those after it do not "
                "fit float16: they are not finite or above 65504; look at the teacher"
            )
        self.file.write(logits.contiguous().numpy().astype("<f2", copy=False).tobytes())
        self.rows += len(logits)
        if time.monotonic() - self.saved_at > SAFE_SECONDS:
            self.save()

    def save(self) -> None:
        """Put all rows on the disk, then say so."""
        self.file.flush()
        os.fsync(self.file.fileno())
        write_json(self.part / PROGRESS, {"rows": self.rows, "fingerprint": self.fingerprint})
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Write the manifest and give the folder its name."""
        assert self.rows == math.prod(self.shape[:2]), "a cache is finished when it is full"
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
        (self.folder / PROGRESS).unlink()  # last: a kill before it finishes once more
        shutil.rmtree(old, ignore_errors=True)
