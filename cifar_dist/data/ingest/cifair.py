"""Read ciFAIR-100, a test split without near-duplicates of training images.

Barz and Denzler 2020, arXiv 1902.00423.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from pathlib import Path

import torch

from cifar_dist.data.dataset import Labels, Split, read_hierarchy
from cifar_dist.data.ingest.pickles import MAX_BYTES, RawMeta, read_cifair_pickle
from cifar_dist.utils.errors import UserError

FOLDER = "ciFAIR-100"
PUBLISHED_MD5 = "8130dae8d6fc6a436437f0ebdb801df1"  # of `test`, as in its authors' loaders


def cifair_split(
    source: Path, data: Path, device: torch.device, labels: Labels = "fine"
) -> tuple[Split, bool]:
    """Read the test split from the published folder or zip.

    Returns the split and whether it is the published one. Its superclasses must match those of `data`.
    """
    content, hierarchy = read_test_file(source), read_hierarchy(data)
    if not hierarchy.coarse:
        raise UserError(f"{data} has no superclasses, so {source} does not belong to it")
    meta = RawMeta(fine_label_names=list(hierarchy.fine), coarse_label_names=list(hierarchy.coarse))
    raw = read_cifair_pickle(io.BytesIO(content), meta)
    fine, coarse = torch.from_numpy(raw.fine_labels), torch.from_numpy(raw.coarse_labels)
    if not torch.equal(hierarchy.coarse_of_fine[fine], coarse):
        raise UserError(
            f"{source}: its classes have other superclasses than those of {data}; use the ciFAIR-100 "
            "files that belong to the data"
        )
    images = torch.from_numpy(raw.images).view(-1, 3, 32, 32)
    published = hashlib.md5(content, usedforsecurity=False).hexdigest() == PUBLISHED_MD5
    of_split = fine if labels == "fine" else coarse
    return Split(images=images.to(device), labels=of_split.to(device)), published


def read_test_file(source: Path) -> bytes:
    """Return the bytes of `test` in the folder, its parent, or the zip, which is not extracted."""
    remedy = f"give the folder {FOLDER} that contains test, or {FOLDER}.zip"
    try:
        if source.is_dir():
            folder = source / FOLDER if (source / FOLDER).is_dir() else source
            with (folder / "test").open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        else:
            with zipfile.ZipFile(source) as archive, archive.open(f"{FOLDER}/test") as member:
                content = member.read(MAX_BYTES + 1)
    except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).strip("'\"")
        raise UserError(f"{source} is not ciFAIR-100 ({reason}); {remedy}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{source} is larger than any CIFAR file; {remedy}")
    return content
