"""Convert CIFAR-100, or synthetic data, to the Arrow dataset that training reads."""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cifar_dist.data.dataset import (
    DATASET,
    DIGEST,
    INFO,
    SPLITS,
    TABLE,
    content_digest,
    data_digest,
    read_digest,
    read_split,
    write_dataset,
)
from cifar_dist.data.ingest.archive import FOLDER, OFFICIAL_MD5, is_official, read_members
from cifar_dist.data.ingest.download import download
from cifar_dist.data.ingest.pickles import (
    RawMeta,
    RawSplit,
    check_hierarchy,
    read_meta,
    read_pickle,
)
from cifar_dist.data.ingest.synthetic import draw_synthetic, pickle_members
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import folder_lock

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = {OFFICIAL_URL: "eb9058c3a382ffc7106e4002c42a8d85"}
SYNTHETIC = "sample"
CLUTTER = re.compile(  # of file managers, of the caches of `datasets`, and of NFS
    r"\.DS_Store|\._.*|\.directory|Thumbs\.db|desktop\.ini|cache-.*\.arrow|\.nfs.*", re.IGNORECASE
)
REMEDY = "choose another folder (--output of prepare, data.path of a recipe)"  # train prepares too

Content = Literal["official", "sample", "other"]


def prepare(
    source: str | None, output: Path, *, allow_unofficial: bool = False, force: bool = False
) -> None:
    """Write the dataset that `load_split` reads to `output`, unless `output` has that data already.

    `source` is an http(s) URL, an archive, a folder, "sample", or None for the official URL. Its
    three files must be the published ones (by MD5) unless `allow_unofficial`. After a UserError
    nothing is left behind except a partial download, which the next call resumes.
    """
    started = time.monotonic()
    source = source or OFFICIAL_URL
    output = output.expanduser().resolve()
    with folder_lock(output.parent, remedy=REMEDY):
        for path in output.parent.iterdir():  # left by a killed process
            if re.fullmatch(rf"\.{re.escape(output.name)}\.\d+\.part", path.name):
                shutil.rmtree(path, ignore_errors=True)
        _refuse_foreign_files(output)
        existing = None if force else _read_existing(output)
        expected = SYNTHETIC if source == SYNTHETIC else None if allow_unofficial else "official"
        if existing is not None and expected is not None:
            _report_existing(output, same=existing["content"] == expected)
            return
        content: Content
        if source == SYNTHETIC:
            content, members = "sample", pickle_members(*draw_synthetic())
        else:
            members = _read_source(source, output)
            content = "official" if is_official(members) else "other"
            if content != expected and expected is not None:
                command = _command(output, "--allow-unofficial", "--source", source)
                raise UserError(f"{source} is not the official CIFAR-100; to use it, run {command}")
        train, test, meta = _parse(members, source)
        if existing is not None:
            digests = {"train": content_digest(train, meta), "test": content_digest(test, meta)}
            _report_existing(output, same=all(existing[s]["sha256"] == digests[s] for s in SPLITS))
            return
        pickles = {f"{FOLDER}/{name}": data for name, data in members.items()}
        write_dataset(
            output,
            train,
            test,
            meta,
            content=content,
            extra_files=pickles if source == SYNTHETIC else None,
        )
    print(
        f"{output}: {content} data, {len(train.images):,} + {len(test.images):,} rows, digest "
        f"{data_digest(output)[:12]}, {time.monotonic() - started:.1f} s; open it with\n"
        f"  from datasets import load_from_disk\n"
        f'  train, test = load_from_disk("{output}").values()',
        flush=True,
    )


def _command(output: Path, *options: str) -> str:
    words = ["python", "-m", "cifar_dist.prepare", *options, "--output", str(output)]
    return f"`{shlex.join(words)}`"


def _read_source(source: str, output: Path) -> dict[str, bytes]:
    if not source.startswith(("http://", "https://")):
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(
                f"{source} does not exist; give an archive, a folder or a URL "
                "(--source of prepare, data.source of a recipe)"
            )
        return read_members(path)
    # Named after the URL, so that a download never resumes that of another URL.
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    part = output.with_name(f"{output.name}.{key}.part")
    remedy = f"get the file in another way and run {_command(output, '--source', 'FILE')}"
    download(source, part, md5=ARCHIVE_MD5.get(source), remedy=remedy)
    try:
        return read_members(part)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    finally:
        part.unlink()


def _parse(members: dict[str, bytes], source: str) -> tuple[RawSplit, RawSplit, RawMeta]:
    try:
        train = read_pickle(io.BytesIO(members["train"]), "train")
        test = read_pickle(io.BytesIO(members["test"]), "test")
        check_hierarchy(train, test)
        return train, test, read_meta(io.BytesIO(members["meta"]))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _read_existing(output: Path) -> dict[str, Any] | None:
    """Verify the dataset at `output` and return its digest, or None if there is none."""
    if not output.is_dir() or not _contained_files(output):
        return None
    for name in SPLITS:
        read_split(output, name)
    return read_digest(output)


def _report_existing(output: Path, *, same: bool) -> None:
    if not same:
        raise UserError(
            f"{output} contains other data; {REMEDY}, or replace it with "
            f"{_command(output, '--force')} and your --source or --sample"
        )
    print(f"{output} is complete (digest {data_digest(output)[:12]}); nothing to do", flush=True)


def _refuse_foreign_files(output: Path) -> None:
    """Raise UserError if `output` contains files that `prepare` does not write."""
    if not output.exists():
        return
    names = _contained_files(output) if output.is_dir() else {output.name}
    if names and not {DATASET, DIGEST} <= names:  # another program's dataset has no digest
        raise UserError(f"{output} was not written by cifar_dist; {REMEDY}")
    known = {DATASET, DIGEST}
    known |= {f"{split}/{name}" for split in SPLITS for name in (TABLE, INFO, "state.json")}
    with suppress(UserError):
        if read_digest(output)["content"] == SYNTHETIC:
            known |= {f"{FOLDER}/{name}" for name in OFFICIAL_MD5}
    if foreign := sorted(names - known):
        raise UserError(f"{output} contains {foreign[0]}, which is not part of a dataset; {REMEDY}")


def _contained_files(folder: Path) -> set[str]:
    """Return the relative paths of all files and links in a folder, without those in CLUTTER."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and not CLUTTER.fullmatch(path.name)
    }
