"""List the test pictures that the training set has as well, or nearly so: row numbers, no pictures.

About 900 of CIFAR-100's 10,000 test pictures have a near-duplicate in train (Barz and Denzler 2020,
arXiv 1902.00423). This search finds the plain cases, so it gives a lower bound.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.command_line import command_parser
from cifar_dist.data.arrow import data_digest, load_split, read_digest
from cifar_dist.engine.results import read_json
from cifar_dist.engine.runtime import log, log_to_terminal, progress_bar
from cifar_dist.errors import UserError, run_command
from cifar_dist.files import try_place, write_file

# Cosines of two views of a picture at 16 x 16 px; a pair has to reach both. On CIFAR-100 they find
# 281 pairs, some 40 of which are, to the eye, other things that look alike (apples, cans, clocks).
MIN_DETAIL, MIN_LAYOUT = 0.8, 0.9
BLOCK_SIZE = 500
NOISE = 4.0  # grey levels; detail below it says little
OFFICIAL_LIST = Path(__file__).parent / "data" / "near_duplicates.json"


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


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "near_duplicates",
        "List the test pictures with a near-duplicate in train, as row numbers. The list of the "
        "official CIFAR-100 comes with cifar_dist; evaluate uses it.",
        "python -m cifar_dist.near_duplicates --data data/cifar100 --output duplicates.json",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar100"), help="default: data/cifar100"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a JSON file")
    options = parser.parse_args(arguments)

    log_to_terminal()
    try_place(options.output)
    train, test = (load_split(options.data, name).images for name in ("train", "test"))
    pairs = find_near_duplicates(train, test, show=True)
    found = {
        "data": data_digest(options.data),
        "min_detail": MIN_DETAIL,
        "min_layout": MIN_LAYOUT,
        "test_rows": [test_row for test_row, _ in pairs],
        "train_rows": [train_row for _, train_row in pairs],
    }
    write_file(options.output, json.dumps(found) + "\n")
    log.info(f"{options.output}: {len(pairs)} of {len(test):,} test pictures are in train, nearly")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
