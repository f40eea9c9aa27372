"""Convert CIFAR-100, CIFAR-10, synthetic data or own images to the Arrow dataset that training reads."""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.data.dataset import (
    DATASET,
    DIGEST,
    INFO,
    SPLITS,
    TABLE,
    Content,
    content_digest,
    data_digest,
    read_digest,
    read_split,
    write_dataset,
)
from cifar_dist.data.ingest.archive import (
    CIFAR_100,
    DATASETS,
    Published,
    read_members,
    wrong_data_error,
)
from cifar_dist.data.ingest.download import download
from cifar_dist.data.ingest.own_images import ImageOptions, read_own_images
from cifar_dist.data.ingest.pickles import (
    RawMeta,
    RawSplit,
    check_hierarchy,
    concatenate,
    read_meta,
    read_pickle,
)
from cifar_dist.data.ingest.synthetic import draw_synthetic, pickle_members
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import folder_lock

SYNTHETIC = "sample"
CLUTTER = re.compile(  # of file managers, of the caches of `datasets`, and of NFS
    r"\.DS_Store|\._.*|\.directory|Thumbs\.db|desktop\.ini|cache-.*\.arrow|\.nfs.*", re.IGNORECASE
)
REMEDY = "choose another folder (--output of prepare, data.path of a recipe)"  # train prepares too


def prepare(
    source: str | None,
    output: Path,
    *,
    dataset: Published | None = None,
    allow_unofficial: bool = False,
    force: bool = False,
) -> None:
    """Write the dataset that `load_split` reads to `output`, unless `output` has that data already.

    `source` is an http(s) URL, an archive, a folder, "sample", or None for the URL of `dataset`. It must
    contain `dataset`, or either of them if that is None. Its files must be the published ones (by MD5)
    unless `allow_unofficial`. After a UserError nothing is left behind except a partial download, which
    the next call resumes.
    """
    started = time.monotonic()
    source = source or (dataset or CIFAR_100).url
    published_url = find_published(source)
    dataset = dataset or published_url
    if dataset and published_url not in (None, dataset):
        assert published_url
        raise wrong_data_error(source, published_url, [dataset])
    with _claim_output(output, force=force) as (output, existing):
        expected = None
        if source == SYNTHETIC:
            expected = SYNTHETIC
        elif dataset and not allow_unofficial:
            expected = dataset.content
        if existing is not None and expected is not None:
            _report_existing(output, same=existing["content"] == expected)
            return
        content: Content
        if source == SYNTHETIC:
            published, content, members = CIFAR_100, "sample", pickle_members(*draw_synthetic())
        else:
            published, members = _read_source(source, output, dataset)
            content = published.content if published.is_official(members) else "other"
            if content == "other" and not allow_unofficial:
                command = _command(output, published, "--allow-unofficial", "--source", source)
                raise UserError(
                    f"{source} is not the official {published.name}; to use it, run {command}"
                )
        splits = _parse(published, members, source)
        pickles = {f"{published.folder}/{name}": data for name, data in members.items()}
        extra_files = pickles if source == SYNTHETIC else None
        if _write(output, existing, *splits, content=content, extra_files=extra_files):
            _report_written(output, content, started)


def prepare_images(path: Path, output: Path, options: ImageOptions, *, force: bool = False) -> None:
    """Write a dataset of the images in `path` to `output`, unless `output` has them already.

    See `read_own_images`. After a UserError nothing is left behind.
    """
    started = time.monotonic()
    with _claim_output(output, force=force) as (root, existing):
        train, test, meta = read_own_images(path, options)
        if not _write(root, existing, train, test, meta, content="other"):
            return
        _report_written(root, "other", started)
        mean, std = (
            ",".join(f"{value:.4f}" for value in values)
            for values in pixel_statistics(train.images)
        )
        size, name = options.size, re.sub(r"[^\w.-]+|^\W+", "_", root.name, flags=re.ASCII)
        if not re.match(r"[A-Za-z_]", name):
            name = f"data_{name}"  # YAML could read it as a number
        rows = len(train.images)  # at least ten steps per epoch; quick has batches of 125
        batch = f" run.batch_size={max(2, rows // 10)}" if rows < 10 * 125 else ""
        print(
            f"{len(meta.fine_label_names)} classes, images of {size} px; train on them with\n"
            f"  cifar-dist train quick name={name} data.path={shlex.quote(str(output))} "
            f"model.image_size={size} 'model.mean=[{mean}]' 'model.std=[{std}]'{batch}",
            flush=True,
        )


@contextmanager
def _claim_output(output: Path, *, force: bool) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Yield the absolute path of `output` and the digest of its data, None without data or by `force`.

    No other process writes to it inside the context.
    """
    output = output.expanduser().resolve()
    with folder_lock(output.parent, remedy=REMEDY):
        for path in output.parent.iterdir():  # left by a killed process
            kinds = "part|old" if output.exists() else "part"  # an old one may be the only copy
            if re.fullmatch(rf"\.{re.escape(output.name)}\.\d+\.({kinds})", path.name):
                shutil.rmtree(path, ignore_errors=True)
        _refuse_foreign_files(output)
        yield output, None if force else _read_existing(output)


def _write(
    output: Path,
    existing: dict[str, Any] | None,
    train: RawSplit,
    test: RawSplit,
    meta: RawMeta,
    *,
    content: Content,
    extra_files: Mapping[str, bytes] | None = None,
) -> bool:
    """Write the dataset; return False if `output` has it already, UserError if it has another one."""
    if existing is not None:
        digests = {"train": content_digest(train, meta), "test": content_digest(test, meta)}
        _report_existing(output, same=all(existing[s]["sha256"] == digests[s] for s in SPLITS))
        return False
    write_dataset(output, train, test, meta, content=content, extra_files=extra_files)
    return True


def _report_written(output: Path, content: Content, started: float) -> None:
    train, test = (read_digest(output)[split]["rows"] for split in SPLITS)
    print(
        f"{output}: {content} data, {train:,} + {test:,} rows, digest "
        f"{data_digest(output)[:12]}, {time.monotonic() - started:.1f} s; open it with\n"
        f"  from datasets import load_from_disk\n"
        f'  train, test = load_from_disk("{output}").values()',
        flush=True,
    )


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, f64 [3] on the scale 0 to 1.

    `images` are uint8 [N, 3 * S * S].
    """
    counts = [np.bincount(part.reshape(-1), minlength=256) for part in np.split(images, 3, axis=1)]
    levels, weights = np.arange(256) / 255, np.array(counts) / counts[0].sum()
    mean = weights @ levels
    return mean, np.sqrt(weights @ levels**2 - mean**2)


def find_published(source: str | None) -> Published | None:
    """Return the data set of which `source` is the official URL, or None."""
    return next((one for one in DATASETS.values() if one.url == source), None)


def _command(output: Path, dataset: Published | None, *options: str) -> str:
    words = ["python", "-m", "cifar_dist.prepare", *options, "--output", str(output)]
    if dataset and dataset is not CIFAR_100:
        words[3:3] = ["--dataset", dataset.key]
    return f"`{shlex.join(words)}`"


def _read_source(
    source: str, output: Path, dataset: Published | None
) -> tuple[Published, dict[str, bytes]]:
    candidates = (dataset,) if dataset else tuple(DATASETS.values())
    if not source.startswith(("http://", "https://")):
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(
                f"{source} does not exist; give an archive, a folder or a URL "
                "(--source of prepare, data.source of a recipe)"
            )
        return read_members(path, candidates)
    # Named after the URL, so that a download never resumes that of another URL.
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    part = output.with_name(f"{output.name}.{key}.part")
    command = _command(output, dataset, "--source", "FILE")
    remedy = f"get the file in another way and run {command}"
    published = find_published(source)
    download(source, part, md5=published.archive_md5 if published else None, remedy=remedy)
    try:
        return read_members(part, candidates)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    finally:
        part.unlink()


def _parse(
    published: Published, members: dict[str, bytes], source: str
) -> tuple[RawSplit, RawSplit, RawMeta]:
    try:
        meta = read_meta(io.BytesIO(members[published.meta]), published.meta)
        *parts, test = (
            read_pickle(io.BytesIO(members[name]), name, meta)
            for name in (*published.train, published.test)
        )
        train = concatenate(parts) if parts[1:] else parts[0]  # without a copy
        check_hierarchy(train, test)
        return train, test, meta
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
            f"{_command(output, None, '--force')} and your --source, --sample, --images or --dataset"
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
            known |= {f"{CIFAR_100.folder}/{name}" for name in CIFAR_100.md5}
    if foreign := sorted(names - known):
        raise UserError(f"{output} contains {foreign[0]}, which is not part of a dataset; {REMEDY}")


def _contained_files(folder: Path) -> set[str]:
    """Return the relative paths of all files and links in a folder, without those in CLUTTER."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and not CLUTTER.fullmatch(path.name)
    }
