"""Find test images with a near-duplicate in the training set, and read stored lists of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.dataset import data_digest, read_digest
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import try_read_json
from cifar_dist.utils.log import progress_bar

# Minimal cosine similarities of two descriptors at GRID x GRID px; a pair has to reach both. On CIFAR-100
# 281 pairs do; about 40 of them are different objects that look alike (apples, cans, clocks).
MIN_DETAIL, MIN_LAYOUT = 0.8, 0.9
GRID = 16
BLOCK_SIZE = 500
NOISE = 4.0  # gray levels; suppresses weaker detail
OFFICIAL_LIST = Path(__file__).parent / "near_duplicates.json"


def _blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)


def layout_descriptor(images: Tensor) -> Tensor:
    """Return unit vectors, f32 [N, 768], of brightness and color by position, without contrast."""
    small = F.adaptive_avg_pool2d(images.float(), GRID).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True))


def detail_descriptor(images: Tensor) -> Tensor:
    """Return unit vectors, f32 [N, 768], of the locally normalized difference from the blurred image."""
    small = F.adaptive_avg_pool2d(images.float(), GRID)
    edges = small - _blur(small)
    amplitude = _blur(edges.square().mean(1, keepdim=True)).sqrt()
    return F.normalize((edges / (amplitude + NOISE)).flatten(1))


def find_near_duplicates(
    train: Tensor, test: Tensor, *, show_progress: bool = False
) -> list[list[int]]:
    """Return [test row, train row] of each test image with a near-duplicate, mirrored or not, in train.

    Images are uint8 [N, 3, S, S]. CIFAR-100 takes 20 s on two cores and 1 GB besides the images.
    """
    train_details = [detail_descriptor(train), detail_descriptor(train.flip(3))]
    pairs = []
    with progress_bar(0, len(test), enabled=show_progress, unit="image") as bar:
        for start in range(0, len(test), BLOCK_SIZE):
            block = test[start : start + BLOCK_SIZE]
            details, layouts = detail_descriptor(block), layout_descriptor(block)
            cosines = torch.maximum(*(details @ other.T for other in train_details))
            detail_cosine, nearest = cosines.max(1)
            candidates = train[nearest]
            layout_cosine = torch.maximum(
                *((layouts * layout_descriptor(x)).sum(1) for x in (candidates, candidates.flip(3)))
            )
            is_pair = (detail_cosine >= MIN_DETAIL) & (layout_cosine >= MIN_LAYOUT)
            rows = is_pair.nonzero().flatten().tolist()
            pairs += [[start + row, int(nearest[row])] for row in rows]
            bar.update(len(block))
    return pairs


def read_list(data: Path, path: Path | None) -> dict[str, Any] | None:
    """Read a list of near-duplicates and check that it belongs to `data`.

    Without a path, read the list of the official CIFAR-100, and return None if `data` differs from it.
    """
    content = try_read_json(path or OFFICIAL_LIST)
    remedy = (
        f"create one with `python -m cifar_dist.near_duplicates --data {data} --output {path}`"
        if path
        else "install cifar_dist again"
    )
    if (
        content is None
        or not {"data", "test_rows", "min_detail", "min_layout"} <= content.keys()
        or not isinstance(content["test_rows"], list)
        or not all(type(row) is int and row >= 0 for row in content["test_rows"])
    ):
        raise UserError(f"{path or OFFICIAL_LIST} is not a list of near-duplicates; {remedy}")
    if content["data"] != data_digest(data):
        if path is None:
            return None
        raise UserError(f"{path} belongs to other data than {data}; {remedy}")
    if max(content["test_rows"], default=0) >= read_digest(data)["test"]["rows"]:
        raise UserError(f"{path} lists rows that {data} does not have; {remedy}")
    return content
