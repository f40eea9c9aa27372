"""Read the files of CIFAR-100 or CIFAR-10 from a folder or an archive, without extracting it."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cifar_dist.data.ingest.pickles import MAX_BYTES
from cifar_dist.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published data set: its archive and its files with their MD5s, as torchvision lists them.

    See https://github.com/pytorch/vision, torchvision/datasets/cifar.py.
    """

    name: str
    key: str  # of DATASETS, for --dataset
    content: Literal["official", "cifar10"]  # in digest.json
    url: str
    archive_md5: str
    folder: str  # in the archive
    train: tuple[str, ...]  # files in the order of their rows
    test: str
    meta: Literal["meta", "batches.meta"]
    md5: dict[str, str]  # by file
    num_classes: dict[Literal["fine", "coarse"], int]  # by data.labels

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def remedy(self) -> str:
        *names, last = self.md5
        return f"give {self.archive}, or the folder that contains its files {', '.join(names)} and {last}"

    def is_official(self, members: dict[str, bytes]) -> bool:
        """Return whether the members are byte for byte the published files."""
        return {
            name: hashlib.md5(data, usedforsecurity=False).hexdigest()
            for name, data in members.items()
        } == self.md5


CIFAR_100 = Published(
    name="CIFAR-100",
    key="cifar100",
    content="official",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    num_classes={"fine": 100, "coarse": 20},
)
CIFAR_10 = Published(
    name="CIFAR-10",
    key="cifar10",
    content="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    num_classes={"fine": 10},
)
DATASETS = {published.key: published for published in (CIFAR_100, CIFAR_10)}
MAX_ARCHIVE_BYTES = 2 * MAX_BYTES  # uncompressed; the official ones have 186 million
MAX_ARCHIVE_MEMBERS = 1_000

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
    ("bin", "mat"): "binary or MATLAB files, not of the Python version of CIFAR",
    ("gz", "xz", "tar", "zip"): "archives",
}


def read_members(
    source: Path, candidates: Sequence[Published] = (CIFAR_100, CIFAR_10)
) -> tuple[Published, dict[str, bytes]]:
    """Return which of the data sets `source` contains, and the bytes of its files by name.

    `source` is a folder or a .tar, .tar.gz or .tar.xz archive. Members are read by name and must be
    regular files that occur once; nothing is extracted.
    """
    try:
        if source.is_dir():
            published, folder = _find_folder(source, candidates)
            members = {name: _read_file(folder / name, published) for name in published.md5}
        else:
            published, members = _read_archive(source, candidates)
    except UserError:
        raise
    except (
        *(OSError, EOFError, ValueError),
        *(tarfile.TarError, lzma.LZMAError, zlib.error),
        RecursionError,  # tarfile recurses into a header that follows another one
    ) as error:
        _refuse_other_file(source, candidates)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source} cannot be read ({reason}); download it again") from error
    if missing := sorted(published.md5.keys() - members.keys()):
        raise UserError(
            f"{source} has no {published.folder}/{missing[0]}; download the official archive"
        )
    return published, members


def _find_folder(source: Path, candidates: Sequence[Published]) -> tuple[Published, Path]:
    """Return the data set whose files are in `source` or its subfolder, and their folder."""
    for published in sorted(candidates, key=lambda one: not (source / one.folder).is_dir()):
        inner = source / published.folder
        folder = inner if inner.is_dir() else source
        if any((folder / name).is_file() for name in published.md5):
            return published, folder
    files = (path for path in source.rglob("*") if path.is_file())
    names = (str(path.relative_to(source)) for path in islice(files, 1000))
    _refuse_other_content(source, "a folder", names, candidates)
    return candidates[0], source


def _read_file(path: Path, published: Published) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing; {published.remedy}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than any CIFAR file; download the official one")
    return path.read_bytes()


def _read_archive(
    path: Path, candidates: Sequence[Published]
) -> tuple[Published, dict[str, bytes]]:
    """Read the data set whose files come first."""
    with path.open("rb") as file:
        magic = file.read(6)
    opened = (gzip if magic[:2] == b"\x1f\x8b" else lzma if magic == b"\xfd7zXZ\0" else io).open(
        path, "rb"
    )
    members: dict[str, bytes] = {}
    others: list[str] = []
    by_folder = {published.folder: published for published in candidates}
    # In stream mode tarfile never seeks, so the limit holds for headers and padding as well.
    with opened, tarfile.open(fileobj=_Limited(opened), mode="r|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for count, member in enumerate(archive):
            if count == MAX_ARCHIVE_MEMBERS:
                _refuse_other_content(path, "an archive", others, candidates)
                raise UserError(f"{path} has too many members; download the official archive")
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder not in by_folder or name not in by_folder[folder].md5:
                others.append(member.name)
                continue
            by_folder = {folder: by_folder[folder]}
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
        _refuse_other_content(path, "an archive", others, candidates)
    return next(iter(by_folder.values())), members


def _remedy(candidates: Sequence[Published]) -> str:
    if len(candidates) == 1:
        return candidates[0].remedy
    archives = " or ".join(published.archive for published in candidates)
    return f"give {archives}, or the folder that contains its files"


def wrong_data_error(
    source: str | Path, other: Published, candidates: Sequence[Published]
) -> UserError:
    return UserError(
        f"{source} is {other.name}, not {candidates[0].name}; {_remedy(candidates)}, or choose "
        f"{other.key} (--dataset of prepare, data.path=data/{other.key} of a recipe)"
    )


def _refuse_other_file(path: Path, candidates: Sequence[Published]) -> None:
    """Raise UserError if a file that is no tar archive is of another known kind."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(64)
        kind = next((kind for magic, kind in FILE_KINDS.items() if start.startswith(magic)), None)
        if start.startswith(b"PK") and b".npy" in start:
            kind = "a NumPy file"
        if kind:
            raise UserError(f"{path} is {kind}; {_remedy(candidates)}")


def _refuse_other_content(
    source: Path, container: str, names: Iterable[str], candidates: Sequence[Published]
) -> None:
    """Raise UserError if the names in a folder or an archive show what it contains instead."""
    paths, remedy = [PurePosixPath(name) for name in names], _remedy(candidates)
    for other in DATASETS.values():
        prefix, first = f"{other.name.lower()}-", other.train[0]  # cifar-10-batches-bin as well
        if other not in candidates and any(
            str(path) == first or any(part.startswith(prefix) for part in path.parts)
            for path in paths
        ):
            raise wrong_data_error(source, other, candidates)
    suffixes = {path.suffix.lower().removeprefix(".") for path in paths}
    for kind_suffixes, kind in CONTENT_KINDS.items():
        if suffixes.intersection(kind_suffixes):
            own = {"image files": "--images", "Parquet files": "--dataset"}.get(kind)
            hint = f", or, for your own images, use `prepare {own} {source}`" if own else ""
            raise UserError(f"{source} is {container} of {kind}; {remedy}{hint}")


class _Limited:
    """A stream whose `read` raises UserError after MAX_ARCHIVE_BYTES."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.remaining = stream, MAX_ARCHIVE_BYTES

    def read(self, count: int) -> bytes:
        chunk = self.stream.read(count)
        self.remaining -= len(chunk)
        if self.remaining < 0:
            raise UserError("the archive unpacks to more than CIFAR; download the official one")
        return chunk
