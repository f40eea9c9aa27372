"""Rows and labels of a recipe: exact counts per class, keyed, and combined in the documented order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import with_classes
from torch import Tensor

from cifar_dist.data.dataset import Split, load_split, read_split, write_dataset
from cifar_dist.data.training_rows import (
    DataConfig,
    describe_rows,
    next_classes,
    select_rows,
    training_data,
)
from cifar_dist.recipe.load import validate
from cifar_dist.utils.errors import UserError


def shuffled(rows_per_class: list[int]) -> Tensor:
    labels = torch.arange(len(rows_per_class)).repeat_interleave(torch.tensor(rows_per_class))
    return labels[torch.randperm(len(labels), generator=torch.manual_seed(0))]


CIFAR = shuffled([500] * 100)


def split_of(labels: Tensor) -> Split:
    images = torch.zeros(len(labels), 0, dtype=torch.uint8)
    return Split(images=images, labels=labels, coarse_labels=labels % 20)


def config(**keys: Any) -> DataConfig:
    return validate({"name": "a", "data": keys}, where="here").data


def counts(labels: Tensor, rows: Tensor, classes: int = 100) -> list[int]:
    return torch.bincount(labels[rows], minlength=classes).tolist()


@pytest.mark.parametrize(("imbalance", "total"), [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_long_tail_has_the_rows_of_the_literature(imbalance: int, total: int) -> None:
    """The totals of CIFAR-100-LT; the counts are those of the code of Cui et al. and Cao et al."""
    rows, val_rows = select_rows(config(long_tail={"imbalance": imbalance}), CIFAR)
    assert len(rows) == total
    assert val_rows is None
    factor = 1 / imbalance
    assert counts(CIFAR, rows) == [int(500 * factor ** (k / 99.0)) for k in range(100)]
    assert torch.equal(rows, rows.unique())


def test_fraction_keeps_the_rounded_part_of_each_class_and_at_least_one_row() -> None:
    labels = shuffled([500, 26, 14, 3, 1, 0, 15])
    rows, _ = select_rows(config(fraction=0.1), labels)
    assert counts(labels, rows, 7) == [50, 3, 1, 1, 1, 0, 2]  # 2.6, 1.4, 0.3, 0.1; 1.5 to even
    assert torch.equal(rows, rows.unique())


def test_smaller_subsets_are_parts_of_larger_ones() -> None:
    chain = (
        {"fraction": 1.0},
        {"fraction": 0.5},
        {"fraction": 0.5, "long_tail": {"imbalance": 10}},
        {"fraction": 0.5, "long_tail": {"imbalance": 100}},
        {"fraction": 0.2, "long_tail": {"imbalance": 100}},
    )
    sets = [set(select_rows(config(**keys), CIFAR)[0].tolist()) for keys in chain]
    assert all(smaller < larger for larger, smaller in pairwise(sets))


def test_keys_combine_in_their_order() -> None:
    """Fraction, long tail, validation split, noise: each counts the rows that the previous one left."""
    data = training_data(
        config(
            fraction=0.4,  # 200 rows per class
            long_tail={"imbalance": 10},  # 200, 195, ..., 20
            val_size=1000,  # 10 per class
            label_noise={"kind": "symmetric", "rate": 0.3},
        ),
        split_of(CIFAR),
    )
    assert data.val_rows is not None
    kept = [int(200 / 10 ** (k / 99)) for k in range(100)]
    assert counts(CIFAR, data.rows) == [n - 10 for n in kept]
    assert counts(CIFAR, data.val_rows) == [10] * 100
    assert not set(data.rows.tolist()) & set(data.val_rows.tolist())
    is_wrong = data.split.labels != CIFAR
    assert counts(CIFAR, data.rows[is_wrong[data.rows]]) == [round(0.3 * (n - 10)) for n in kept]
    assert counts(CIFAR, data.val_rows[is_wrong[data.val_rows]]) == [3] * 100
    others = torch.ones(len(CIFAR), dtype=torch.bool)
    others[data.rows], others[data.val_rows] = False, False
    assert not is_wrong[others].any()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_noise_keeps_the_rows_and_is_exact_in_both_parts(kind: str) -> None:
    noise = {"kind": kind, "rate": 0.2}
    split = split_of(CIFAR)
    clean = training_data(config(val_size=5000), split)
    noisy = training_data(config(val_size=5000, label_noise=noise), split)
    assert clean.val_rows is not None
    assert noisy.val_rows is not None
    assert torch.equal(noisy.rows, clean.rows)
    assert torch.equal(noisy.val_rows, clean.val_rows)
    assert clean.split is split
    for rows, wrong in ((noisy.rows, 90), (noisy.val_rows, 10)):
        is_wrong = noisy.split.labels[rows] != CIFAR[rows]
        assert counts(CIFAR, rows[is_wrong]) == [wrong] * 100
    assert torch.equal(split.labels, CIFAR), "the original labels must not be overwritten"


def test_symmetric_noise_is_uniform_over_the_other_classes() -> None:
    labels = shuffled([20_000] * 5)
    noise = {"kind": "symmetric", "rate": 0.4}
    noisy = training_data(config(label_noise=noise), split_of(labels)).split.labels
    table = torch.bincount(labels * 5 + noisy, minlength=25).view(5, 5)
    assert table.diagonal().tolist() == [12_000] * 5
    others = table[~torch.eye(5, dtype=torch.bool)]
    assert (others - 2000).abs().max() < 5 * 2000**0.5  # five standard deviations


def test_asymmetric_noise_moves_to_the_next_class_of_the_superclass() -> None:
    noise = {"kind": "asymmetric", "rate": 0.4}
    noisy = training_data(config(label_noise=noise), split_of(CIFAR)).split.labels
    table = torch.bincount(CIFAR * 100 + noisy, minlength=10_000).view(100, 100)
    expected = torch.zeros(100, 100, dtype=torch.int64)
    for index in range(100):
        expected[index, index] = 300
        expected[index, (index + 20) % 100] = 200
    assert torch.equal(table, expected)


@pytest.mark.parametrize(
    ("superclasses", "expected"),
    [
        (None, [1, 2, 3, 4, 0]),
        ([0, 0, 0, 0, 0], [1, 2, 3, 4, 0]),
        ([0, 1, 0, 1, 0], [2, 3, 4, 1, 0]),
        ([0, 1, 2, 3, 4], [1, 2, 3, 4, 0]),
        ([3, 3, 1, 3, 2], [1, 3, 3, 0, 0]),
    ],
)
def test_next_class_without_and_with_superclasses(
    superclasses: list[int] | None, expected: list[int]
) -> None:
    labels = torch.arange(5).repeat(3)
    coarse = None if superclasses is None else torch.tensor(superclasses)[labels]
    assert next_classes(labels, coarse).tolist() == expected


def test_superclasses_are_those_of_the_labels(data: Path, tmp_path: Path) -> None:
    """Superclasses as labels, and data like CIFAR-10, have none: the next of all classes."""
    coarse_labels = load_split(data, "train").coarse_labels
    assert coarse_labels is not None
    assert coarse_labels.tolist() == read_split(data, "train").coarse_labels.tolist()
    write_dataset(tmp_path / "data", *with_classes(12), content="other")
    noise = {"kind": "asymmetric", "rate": 0.5}
    for split, classes in (
        (load_split(data, "train", labels="coarse"), int(coarse_labels.max()) + 1),
        (load_split(tmp_path / "data", "train"), 12),
    ):
        assert split.coarse_labels is None
        noisy = training_data(config(label_noise=noise), split).split.labels
        moved = noisy != split.labels
        assert moved.any()
        assert torch.equal(noisy[moved], (split.labels[moved] + 1) % classes)


def test_noise_depends_on_its_seed_and_grows_with_its_rate() -> None:
    def labels(**noise: Any) -> Tensor:
        keys = {"kind": "symmetric", "rate": 0.2, "seed": 0} | noise
        return training_data(config(label_noise=keys), split_of(CIFAR)).split.labels

    first = labels()
    assert torch.equal(first, labels())
    assert not torch.equal(first, labels(seed=1))
    assert torch.equal(labels(rate=0.0), CIFAR)
    is_wrong = first != CIFAR
    assert torch.equal(labels(rate=0.6)[is_wrong], first[is_wrong])


def test_rows_and_labels_are_the_same_in_all_versions() -> None:
    """Stored numbers: rows and labels of existing runs must never change."""
    data = training_data(
        config(
            fraction=0.5,
            long_tail={"imbalance": 2},
            val_size=3,
            label_noise={"kind": "symmetric", "rate": 0.5, "seed": 3},
        ),
        split_of(torch.arange(60) % 3),
    )
    assert data.val_rows is not None
    assert data.rows.tolist() == [
        0, 3, 4, 15, 16, 17, 27, 28, 29, 32, 33, 36, 37, 45, 46, 50, 51, 55, 57
    ]  # fmt: skip
    assert data.val_rows.tolist() == [7, 39, 59]
    assert data.split.labels[data.rows].tolist() == [
        1, 1, 0, 0, 1, 1, 0, 0, 2, 0, 0, 1, 1, 1, 1, 2, 0, 2, 0
    ]  # fmt: skip
    assert data.split.labels[data.val_rows].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_noise": {"kind": "symmetric", "rate": 1.0}}, r"data\.label_noise\.rate: .*got 1"),
        ({"label_noise": {"kind": "symmetric", "rate": -0.1}}, r"data\.label_noise\.rate: .*got -"),
        ({"label_noise": {"kind": "pair", "rate": 0.1}}, r"data\.label_noise\.kind: .*symmetric"),
        ({"label_noise": {"kind": "symmetric"}}, r"data\.label_noise\.rate: "),
        ({"long_tail": {"imbalance": 0.5}}, r"data\.long_tail\.imbalance: .*got 0\.5"),
        ({"long_tail": {"imbalance": 501}}, "leaves a class without rows.*at most 500"),
        ({"long_tail": {"imbalance": 60}, "fraction": 0.1}, "imbalance=60: .*at most 50"),
        ({"long_tail": {"imbalance": 100}, "val_size": 500}, "one class has only 5; lower it"),
        ({"fraction": 0.0}, r"data\.fraction: .*got 0"),
        ({"fraction": 1.5}, r"data\.fraction: .*got 1\.5"),
        ({"fraction": 0.001, "val_size": 100}, r"data\.val_size=100: .*below 100 "),
        ({"fraction": 0.004, "val_size": 200}, r"data\.val_size=200: .*below 200 "),
    ],
)
def test_wrong_keys_are_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_rows(config(**keys), CIFAR)


def test_description_counts_rows_and_wrong_labels() -> None:
    def described(**keys: Any) -> str | None:
        data = training_data(config(**keys), split_of(CIFAR))
        return describe_rows(config(**keys), split_of(CIFAR), data)

    assert described() is None
    assert described(val_size=5000) is None
    noise = {"kind": "asymmetric", "rate": 0.1}
    assert described(val_size=400, long_tail={"imbalance": 100}) == (
        "10,447 of 50,000 rows, 1 to 496 per class"
    )
    assert described(fraction=0.1, label_noise=noise) == (
        "5,000 of 50,000 rows, 50 per class; 500 labels are wrong (asymmetric noise)"
    )
    assert described(val_size=5000, label_noise=noise) == (
        "4,500 labels are wrong (asymmetric noise)"
    )
