"""The search for test pictures that train has as well: drawn pictures, changed as copies are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cifar_dist.data.dataset import data_digest, load_split
from cifar_dist.data.ingest.near_duplicates import OFFICIAL_LIST, find_near_duplicates, read_list
from cifar_dist.near_duplicates import main
from cifar_dist.utils.errors import UserError


def textures(count: int, seed: int) -> torch.Tensor:
    """Pictures with detail of their own: coarse noise made large."""
    stream = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=stream)
    large = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    return (large * 255).to(torch.uint8)


def test_copies_are_found_and_others_are_not() -> None:
    train, test = textures(300, seed=0), textures(40, seed=1)
    brighter = train[7].float() * 0.8 + 40
    noisy = train[9].float() + 6 * torch.randn(
        3, 32, 32, generator=torch.Generator().manual_seed(2)
    )
    test[3] = train[5].flip(2)
    test[4] = brighter.clamp(0, 255).to(torch.uint8)
    test[5] = noisy.clamp(0, 255).to(torch.uint8)
    assert find_near_duplicates(train, test) == [[3, 5], [4, 7], [5, 9]]


def test_flat_pictures_are_no_copies_of_each_other() -> None:
    """A plain sky has the layout of another, but no detail to tell that it is the same."""
    flat = torch.full((5, 3, 32, 32), 128, dtype=torch.uint8)
    assert find_near_duplicates(flat, flat + 20) == []


def test_a_list_is_of_one_data_set(data: Path, middle_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "list.json"
    assert main(["--data", str(data), "--output", str(output)]) == 0
    found = read_list(data, output)
    assert found is not None
    assert found["data"] == data_digest(data)
    with pytest.raises(UserError, match="other data"):
        read_list(middle_data, output)
    for rows in (None, ["1"], [-1], [True]):
        output.write_text(json.dumps(found | {"test_rows": rows}))
        with pytest.raises(UserError, match="no list"):
            read_list(data, output)
    output.write_text(json.dumps(found | {"test_rows": [10_000]}))
    with pytest.raises(UserError, match=r"rows that .* does not have"):
        read_list(data, output)
    output.write_text("[]")
    with pytest.raises(UserError, match="no list"):
        read_list(data, output)


def test_the_official_list_holds_row_numbers_of_the_official_data(data: Path) -> None:
    listed = json.loads(OFFICIAL_LIST.read_text())
    assert listed["data"].startswith("b07d8a0b9728")
    assert len(listed["test_rows"]) == len(listed["train_rows"]) == 281
    assert sorted(set(listed["test_rows"])) == listed["test_rows"]
    assert max(listed["test_rows"]) < 10_000
    assert max(listed["train_rows"]) < 50_000
    assert read_list(data, None) is None


def test_the_search_makes_no_difference_between_orders(data: Path) -> None:
    train, test = load_split(data, "train").images, load_split(data, "test").images
    found = find_near_duplicates(train, test)
    backwards = find_near_duplicates(train.flip(0), test)
    assert [(row, len(train) - 1 - known) for row, known in backwards] == [tuple(p) for p in found]
