"""Atomic writes: a file or folder is written under a temporary name, synced and renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar_dist.utils.errors import UserError


@contextmanager
def with_path(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that lacks a file name, as those of write, fsync and pyarrow do."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


@contextmanager
def report_uncreatable(path: Path) -> Iterator[None]:
    """Report a path that cannot be created as a user error; /proc answers ENOENT for one."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be created; choose another path") from None


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they do not exist."""
    with report_uncreatable(path):
        path.mkdir(parents=True, exist_ok=True)


def _absent_folders(path: Path) -> list[Path]:
    """Return `path` and its parents that do not exist, deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


@contextmanager
def folder_lock(folder: Path, *, remedy: str = "choose another path") -> Iterator[None]:
    """Hold an exclusive lock on `folder`, which is created if absent and removed if left empty.

    Raises UserError, which ends in `remedy`, if the path is not a folder.
    """
    absent = _absent_folders(folder)
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{error.filename} is not a folder; {remedy}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        _remove_empty(absent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with with_path(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no fsync for folders
            raise
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename, and accept that a network file system lost its reply and found nothing on the retry."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        if old.exists() or not new.exists():
            raise


def remove_folder(folder: Path) -> None:
    """Rename a folder away, then delete as much of it as other processes' open files allow."""
    temporary = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.gone")
    try:
        rename(folder, temporary)
    except FileNotFoundError:
        return
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `path`, and delete it unless it was renamed."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with report_uncreatable(path), with_path(path):
            temporary.touch()
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step: readers see the old file or the new one.

    A pipe or device is written to directly.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with with_path(path), path.open("wb") as file:
            file.write(data)
        return
    path = path.resolve() if path.is_symlink() else path  # keep the link, replace its target
    with _temporary_file(path) as temporary:
        with with_path(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync(path.parent)


def _is_stream(path: Path) -> bool:
    """Return whether `path` is a pipe or a device, such as /dev/null or /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path) -> None:
    """Raise the error that `atomic_write` would raise for this path, and leave no trace."""
    if _is_stream(path):
        return
    absent = _absent_folders(path.parent)
    try:
        with _temporary_file(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    finally:
        _remove_empty(absent)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` on a clean exit and is deleted otherwise.

    An existing `final` is renamed first and deleted last, so one complete folder always exists.
    An OSError without a file name gets that of `final`.
    """
    make_folder(final.parent)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.part")
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    with report_uncreatable(final):
        temporary.mkdir()
    try:
        with with_path(final):
            yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if final.exists():
            rename(final, old)
        rename(temporary, final)
        sync(final.parent)
    finally:
        if old.exists() and not final.exists():
            rename(old, final)  # the second rename failed
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN and infinity raise ValueError."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no file.

    Raises UserError, which ends in `remedy`, if the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    return value


def try_read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if it cannot be read, for optional information."""
    try:
        return read_json(path, "")
    except (OSError, UserError):
        return None
