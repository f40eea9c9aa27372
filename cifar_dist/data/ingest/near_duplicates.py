"""Find test images with a near-duplicate in the training set, and read stored lists of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.dataset import data_digest, read_digest
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json
from cifar_dist.utils.log import progress_bar

# Cosines of two views of a picture at 16 x 16 px; a pair has to reach both. On CIFAR-100 they find
# 281 pairs, some 40 of which are, to the eye, other things that look alike (apples, cans, clocks).
MIN_DETAIL, MIN_LAYOUT = 0.8, 0.9


BLOCK_SIZE = 500


NOISE = 4.0  # grey levels; detail below it says little


OFFICIAL_LIST = Path(__file__).parent / "near_duplicates.json"


def blurred(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)


def layout(pictures: Tensor) -> Tensor:
    """f32 [N, 768] of length 1: where a picture is bright and in which colour; contrast taken out."""
    small = F.avg_pool2d(pictures.float(), 2).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True))


def detail(pictures: Tensor) -> Tensor:
    """f32 [N, 768] of length 1: what the picture is beside its blur, alike in loud and quiet parts."""
    small = F.avg_pool2d(pictures.float(), 2)
    edges = small - blurred(small)
    loudness = blurred(edges.square().mean(1, keepdim=True)).sqrt()
    return F.normalize((edges / (loudness + NOISE)).flatten(1))


def find_near_duplicates(train: Tensor, test: Tensor, *, show: bool = False) -> list[list[int]]:
    """[test row, train row] of each test picture (uint8 [N, 3, 32, 32]) that train has, or mirrored.

    CIFAR-100 takes 20 s on two cores and 1 GB beside the pictures.
    """
    known = [detail(train), detail(train.flip(3))]
    pairs = []
    with progress_bar(0, len(test), shown=show, unit="picture") as bar:
        for start in range(0, len(test), BLOCK_SIZE):
            block = test[start : start + BLOCK_SIZE]
            wanted = detail(block)
            cosines = torch.maximum(wanted @ known[0].T, wanted @ known[1].T)
            alike, nearest = cosines.max(1)
            found = train[nearest]
            seen = layout(block)
            direct = (seen * layout(found)).sum(1)
            mirrored = (seen * layout(found.flip(3))).sum(1)
            same = (alike >= MIN_DETAIL) & (torch.maximum(direct, mirrored) >= MIN_LAYOUT)
            pairs += [[start + row, int(nearest[row])] for row in same.nonzero().flatten().tolist()]
            bar.update(len(block))
    return pairs


def read_list(data: Path, path: Path | None) -> dict[str, Any] | None:
    """A stored list that was made of these very data; None where none was asked for and ours is of others."""
    found = read_json(path or OFFICIAL_LIST)
    names = {"data", "test_rows", "min_detail", "min_layout"}
    if (
        not isinstance(found, dict)
        or not names <= found.keys()
        or not isinstance(found["test_rows"], list)
        or not all(type(row) is int and row >= 0 for row in found["test_rows"])
    ):
        raise UserError(
            f"{path} is no list of near-duplicates; make one: "
            f"python -m cifar_dist.near_duplicates --data {data} --output {path}"
        )
    if found["data"] == data_digest(data):
        if max(found["test_rows"], default=0) >= read_digest(data)["test"]["rows"]:
            raise UserError(f"{path} names rows that {data} does not have; make it anew")
        return found
    if path is None:
        return None
    raise UserError(f"{path} was made of other data than {data}; make one of these")
