"""Floor 0. On disk a thing is complete or absent: written aside, fsynced, renamed."""

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
    """An error of the storage within names the file; a failed write or fsync itself does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


@contextmanager
def report_uncreatable(path: Path) -> Iterator[None]:
    """Within, a path that is made and yet not found is the person's to mend: /proc answers so."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: nothing can be made there; choose another place") from None


def make_folder(path: Path) -> None:
    """Make it and its parents where they are absent."""
    with report_uncreatable(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def folder_lock(folder: Path, *, elsewhere: str = "choose another place") -> Iterator[None]:
    """One process at a time in `folder`, which is made if absent and goes again if it stays empty.

    UserError, which ends in `elsewhere`, where something else bears its name.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{error.filename} is not a folder; {elsewhere}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        for path in absent:
            with suppress(OSError):  # not empty
                path.rmdir()


def sync(path: Path) -> None:
    """Ask the file system to put a file or a folder's entries on disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with with_path(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some have no fsync of folders
            raise
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """os.rename that knows network file systems: when the answer is lost, the second try finds nothing."""
    try:
        os.rename(old, new)
    except FileNotFoundError:
        if old.exists() or not new.exists():
            raise


def remove_folder(folder: Path) -> None:
    """Make a folder disappear at once, then delete it, as far as open files of others allow."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.gone")
    try:
        rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, which is made; it goes away unless it was renamed."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with report_uncreatable(path), with_path(path):
            aside.touch()
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step; a reader sees the old file or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with path.open("wb") as file:
            file.write(data)
        return
    path = path.resolve() if path.is_symlink() else path  # the link stays, its file is replaced
    with _beside(path) as aside:
        with with_path(path), aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    sync(path.parent)


def _is_stream(path: Path) -> bool:
    """Whether there is something that takes bytes and is no file: a pipe, /dev/null, /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path) -> None:
    """Raise before the work what `write_file` would raise after it; changes nothing."""
    if _is_stream(path):
        return
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        with _beside(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    finally:
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, in one step. NaN is not JSON and is refused."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a folder to fill beside `final`; on a clean exit it becomes `final`, else it goes away.

    An existing `final` is moved out of the way first and removed last, so that at no time there is
    less than one complete folder on the disk.
    """
    make_folder(final.parent)
    aside = final.with_name(f".{final.name}.{os.getpid()}.part")
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    with report_uncreatable(final):
        aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        sync(aside)
        if final.exists():
            rename(final, old)
        rename(aside, final)
        sync(final.parent)
    finally:
        if old.exists() and not final.exists():
            rename(old, final)  # the new one could not take its place
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, remedy: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file; UserError with the remedy for a damaged one."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    return value


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
