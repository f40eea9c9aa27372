"""The search for near-duplicates, on synthetic images and altered copies, and its stored lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cifar_dist.data.dataset import OFFICIAL_DIGEST, data_digest, load_split
from cifar_dist.data.ingest import near_duplicates
from cifar_dist.data.ingest.near_duplicates import OFFICIAL_LIST, find_near_duplicates, read_list
from cifar_dist.near_duplicates import main
from cifar_dist.utils.errors import UserError


def textures(count: int, seed: int) -> torch.Tensor:
    """Return distinct images: upsampled coarse noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    large = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    return (large * 255).to(torch.uint8)


def test_altered_copies_are_found_and_other_images_are_not() -> None:
    train, test = textures(300, seed=0), textures(40, seed=1)
    brighter = train[7].float() * 0.8 + 40
    noisy = train[9].float() + 6 * torch.randn(
        3, 32, 32, generator=torch.Generator().manual_seed(2)
    )
    test[3] = train[5].flip(2)
    test[4] = brighter.clamp(0, 255).to(torch.uint8)
    test[5] = noisy.clamp(0, 255).to(torch.uint8)
    assert find_near_duplicates(train, test) == [[3, 5], [4, 7], [5, 9]]


def test_uniform_images_are_not_duplicates() -> None:
    """They have the same layout, but no detail."""
    flat = torch.full((5, 3, 32, 32), 128, dtype=torch.uint8)
    assert find_near_duplicates(flat, flat + 20) == []


def test_list_is_rejected_for_other_data_or_invalid_rows(
    data: Path, middle_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "list.json"
    assert main(["--data", str(data), "--output", str(output)]) == 0
    content = read_list(data, output)
    assert content is not None
    assert content["data"] == data_digest(data)
    with pytest.raises(UserError, match="other data"):
        read_list(middle_data, output)
    for rows in (None, ["1"], [-1], [True]):
        output.write_text(json.dumps(content | {"test_rows": rows}))
        with pytest.raises(UserError, match="not a list"):
            read_list(data, output)
    output.write_text(json.dumps(content | {"test_rows": [10_000]}))
    with pytest.raises(UserError, match=r"rows that .* does not have"):
        read_list(data, output)
    output.write_text("[]")
    with pytest.raises(UserError, match="not a list"):
        read_list(data, output)


def test_official_list_contains_valid_rows_and_is_ignored_for_other_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = json.loads(OFFICIAL_LIST.read_text())
    assert official["data"] == OFFICIAL_DIGEST
    assert len(official["test_rows"]) == len(official["train_rows"]) == 281
    assert sorted(set(official["test_rows"])) == official["test_rows"]
    assert max(official["test_rows"]) < 10_000
    assert max(official["train_rows"]) < 50_000
    assert read_list(data, None) is None
    monkeypatch.setattr(near_duplicates, "OFFICIAL_LIST", tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"absent\.json is not a list.*install cifar_dist again"):
        read_list(data, None)


def test_search_does_not_depend_on_the_order_of_train(data: Path) -> None:
    train, test = load_split(data, "train").images, load_split(data, "test").images
    pairs = find_near_duplicates(train, test)
    reverse = find_near_duplicates(train.flip(0), test)
    assert [[row, len(train) - 1 - other] for row, other in reverse] == pairs
