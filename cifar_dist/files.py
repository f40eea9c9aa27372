"""Floor 0. On disk a thing is complete or absent: written aside, fsynced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Ask the file system to put a file or a folder's entries on disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step; a reader sees the old file or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, in one step. NaN is not JSON and is refused."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Give a folder to fill beside `final`; on a clean exit it becomes `final`, else it goes away.

    An existing `final` is moved out of the way first and removed last, so that at no time there is
    less than one complete folder on the disk.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.part")
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        sync(aside)
        if final.exists():
            os.rename(final, old)
        os.rename(aside, final)
        sync(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
