"""Floor 1. The three files of CIFAR-100, out of a folder or an archive that is never extracted."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import zlib
from pathlib import Path
from typing import Any

from cifar_dist.data.ingest.pickles import MAX_BYTES
from cifar_dist.utils.errors import UserError

FOLDER = "cifar-100-python"
OFFICIAL_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
MAX_ARCHIVE_BYTES = 2 * MAX_BYTES  # unpacked; the official one has 186 million
MAX_ARCHIVE_MEMBERS = 1_000


def read_members(source: Path) -> dict[str, bytes]:
    """The bytes of `train`, `test` and `meta` in a folder or a .tar, .tar.gz, .tar.xz archive.

    Members are read by name, as regular files that occur once; nothing is ever extracted.
    """
    try:
        if source.is_dir():
            folder = source / FOLDER if (source / FOLDER).is_dir() else source
            members = {name: _read_file(folder / name) for name in OFFICIAL_MD5}
        else:
            members = _read_archive(source)
    except UserError:
        raise
    except (
        *(OSError, EOFError, ValueError),
        *(tarfile.TarError, lzma.LZMAError, zlib.error),
        RecursionError,  # tarfile calls itself for a header that another one announces
    ) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source} cannot be read ({reason}); get the archive again") from error
    if missing := sorted(OFFICIAL_MD5.keys() - members.keys()):
        raise UserError(f"{source} has no {FOLDER}/{missing[0]}; get the official archive")
    return members


def is_official(members: dict[str, bytes]) -> bool:
    """Whether the three members are, byte for byte, the published ones."""
    return {name: _md5(data) for name, data in members.items()} == OFFICIAL_MD5


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing; give the folder that holds train, test and meta")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than any CIFAR-100 file; get the official one")
    return path.read_bytes()


def _read_archive(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    opened = (gzip if magic[:2] == b"\x1f\x8b" else lzma if magic == b"\xfd7zXZ\0" else io).open(
        path, "rb"
    )
    members: dict[str, bytes] = {}
    # As a stream, tarfile only ever reads on, so the bound holds for headers and padding as well.
    with opened, tarfile.open(fileobj=_Bounded(opened), mode="r|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for count, member in enumerate(archive):
            if count == MAX_ARCHIVE_MEMBERS:
                raise UserError(f"{path} has too many members; get the official archive")
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder != FOLDER or name not in OFFICIAL_MD5:
                continue
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if not plain or name in members or member.size > MAX_BYTES:
                raise UserError(
                    f"{path} has a member {member.name} that is not a plain file, occurs twice or "
                    "is too large; get the official archive"
                )
            stream = archive.extractfile(member)
            assert stream is not None
            members[name] = stream.read()
    return members


class _Bounded:
    """A stream's `read`, refused once it has given more than MAX_ARCHIVE_BYTES."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.left = stream, MAX_ARCHIVE_BYTES

    def read(self, count: int) -> bytes:
        chunk = self.stream.read(count)
        self.left -= len(chunk)
        if self.left < 0:
            raise UserError("the archive unpacks to more than CIFAR-100; get the official one")
        return chunk
