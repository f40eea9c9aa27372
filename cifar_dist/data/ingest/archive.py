"""Read the three files of CIFAR-100 from a folder or an archive, without extracting it."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from cifar_dist.data.ingest.pickles import MAX_BYTES
from cifar_dist.utils.errors import UserError

FOLDER = "cifar-100-python"
OFFICIAL_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
MAX_ARCHIVE_BYTES = 2 * MAX_BYTES  # uncompressed; the official one has 186 million
MAX_ARCHIVE_MEMBERS = 1_000
REMEDY = f"give {FOLDER}.tar.gz, or the folder that contains its files train, test and meta"

# What people have instead, by the beginning of a file and by the suffixes in a folder or an archive.
FILE_KINDS = {
    b"PK\x03\x04": "a zip archive, which has to be unpacked first",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy file",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "an image file",
    b"\xff\xd8\xff": "an image file",
    b"BZh": "a bzip2 file",
    b"\x80": "a single pickle file",
}
CONTENT_KINDS = {
    ("png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff"): "image files",
    ("parquet",): "Parquet files",
    ("arrow",): "Arrow files, as prepare writes them for data.path",
    ("npy", "npz"): "NumPy files",
    ("bin", "mat"): "binary or MATLAB files, not of the Python version of CIFAR-100",
    ("gz", "xz", "tar", "zip"): "archives",
}


def read_members(source: Path) -> dict[str, bytes]:
    """Return the bytes of `train`, `test` and `meta` in a folder or a .tar, .tar.gz or .tar.xz archive.

    Members are read by name and must be regular files that occur once; nothing is extracted.
    """
    try:
        if source.is_dir():
            folder = source / FOLDER if (source / FOLDER).is_dir() else source
            if not any((folder / name).is_file() for name in OFFICIAL_MD5):
                files = (path for path in source.rglob("*") if path.is_file())
                names = (str(path.relative_to(source)) for path in islice(files, 1000))
                _refuse_other_content(source, "a folder", names)
            members = {name: _read_file(folder / name) for name in OFFICIAL_MD5}
        else:
            members = _read_archive(source)
    except UserError:
        raise
    except (
        *(OSError, EOFError, ValueError),
        *(tarfile.TarError, lzma.LZMAError, zlib.error),
        RecursionError,  # tarfile recurses into a header that follows another one
    ) as error:
        _refuse_other_file(source)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source} cannot be read ({reason}); download it again") from error
    if missing := sorted(OFFICIAL_MD5.keys() - members.keys()):
        raise UserError(f"{source} has no {FOLDER}/{missing[0]}; download the official archive")
    return members


def is_official(members: dict[str, bytes]) -> bool:
    """Return whether the three members are byte for byte the published ones."""
    return {
        name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in members.items()
    } == OFFICIAL_MD5


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing; give the folder that contains train, test and meta")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than any CIFAR-100 file; download the official one")
    return path.read_bytes()


def _read_archive(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    opened = (gzip if magic[:2] == b"\x1f\x8b" else lzma if magic == b"\xfd7zXZ\0" else io).open(
        path, "rb"
    )
    members: dict[str, bytes] = {}
    others: list[str] = []
    # In stream mode tarfile never seeks, so the limit holds for headers and padding as well.
    with opened, tarfile.open(fileobj=_Limited(opened), mode="r|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for count, member in enumerate(archive):
            if count == MAX_ARCHIVE_MEMBERS:
                _refuse_other_content(path, "an archive", others)
                raise UserError(f"{path} has too many members; download the official archive")
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder != FOLDER or name not in OFFICIAL_MD5:
                others.append(member.name)
                continue
            regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if not regular or name in members or member.size > MAX_BYTES:
                raise UserError(
                    f"{path} has a member {member.name} that is not a regular file, occurs twice or "
                    "is too large; download the official archive"
                )
            stream = archive.extractfile(member)
            assert stream is not None
            members[name] = stream.read()
    if not members:
        _refuse_other_content(path, "an archive", others)
    return members


def _refuse_other_file(path: Path) -> None:
    """Raise UserError if a file that is no tar archive is of another known kind."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(64)
        kind = next((kind for magic, kind in FILE_KINDS.items() if start.startswith(magic)), None)
        if start.startswith(b"PK") and b".npy" in start:
            kind = "a NumPy file"
        if kind:
            raise UserError(f"{path} is {kind}; {REMEDY}")


def _refuse_other_content(source: Path, container: str, names: Iterable[str]) -> None:
    """Raise UserError if the names in a folder or an archive show what it contains instead."""
    paths = [PurePosixPath(name) for name in names]
    if any(part.startswith(("cifar-10-", "data_batch_")) for path in paths for part in path.parts):
        raise UserError(f"{source} is CIFAR-10, not CIFAR-100; {REMEDY}")
    suffixes = {path.suffix.lower().removeprefix(".") for path in paths}
    for kind_suffixes, kind in CONTENT_KINDS.items():
        if suffixes.intersection(kind_suffixes):
            raise UserError(f"{source} is {container} of {kind}; {REMEDY}")


class _Limited:
    """A stream whose `read` raises UserError after MAX_ARCHIVE_BYTES."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.remaining = stream, MAX_ARCHIVE_BYTES

    def read(self, count: int) -> bytes:
        chunk = self.stream.read(count)
        self.remaining -= len(chunk)
        if self.remaining < 0:
            raise UserError("the archive unpacks to more than CIFAR-100; download the official one")
        return chunk
