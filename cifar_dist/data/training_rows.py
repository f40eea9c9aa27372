"""Choose the rows that a recipe trains and validates on, and their labels.

The keys of `data` apply in this order: `fraction` and `long_tail` choose a subset of the training
split, `val_size` splits it, and `label_noise` changes labels of both parts. All of it is a pure function
of the recipe and the labels: the same in any process and at any start. The test split never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from cifar_dist.data.dataset import Labels, Place, Split
from cifar_dist.utils.config import Factor, Index, Share, config
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.random import generator


@config
class LongTail:
    """Exponentially fewer rows per class (Cui et al. 2019, arXiv 1901.05555).

    Class k of C, in the order of the labels, keeps floor(n_max * imbalance^(-k / (C - 1))) rows; n_max is
    the size of the largest class. The floor is that of the authors' code.
    """

    imbalance: Annotated[float, Ge(1)]  # rows of the first class per row of the last one


@config
class LabelNoise:
    """Labels that are wrong, in the training and in the validation rows; never in the test split.

    round(rate * n) of the n rows of each class get another label. `symmetric` draws it uniformly from
    the C - 1 *other* classes. (Some papers draw from all C classes; that is a rate of rate * (C - 1) / C
    here.) `asymmetric` is the next class of the same superclass, and the first class after the last one
    (Patrini et al. 2017, arXiv 1609.03683, their experiment on CIFAR-100). A class without others in its
    superclass gets the next label.
    """

    kind: Literal["symmetric", "asymmetric"]  # which labels replace the original ones
    rate: Share  # part of the rows of each class whose label is wrong
    seed: Index = 0  # chooses the rows, and the labels of symmetric noise


@config
class DataConfig:
    """Where the Arrow data are, what they are made from if they are missing, and which rows to use."""

    path: str = "data/cifar100"  # folder of the prepared data
    # archive, folder or URL from which missing data are prepared; sample: synthetic data; null: none
    source: str | None = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    labels: Labels = "fine"  # fine: the classes; coarse: the superclasses of CIFAR-100
    # device: images in device memory; host: in the page cache of the host, copied for each step
    place: Place = "device"
    shuffle: bool = True  # a new order of the training images in each epoch
    val_size: Index = 0  # training images to hold out for validation, stratified by class
    fraction: Factor = 1.0  # part of each class's training images to use, at least one
    long_tail: LongTail | None = None  # fewer training images per class; null: all
    label_noise: LabelNoise | None = None  # wrong labels for training; null: none

    @property
    def subset(self) -> tuple[float, LongTail | None]:
        """The keys that choose the rows which `val_size` splits."""
        return self.fraction, self.long_tail


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """The training split with the labels of the recipe, and the rows that it uses."""

    split: Split  # all rows, so that a row's augmentation depends on its index alone
    rows: Tensor  # int64, ascending: rows to train on
    val_rows: Tensor | None  # int64, ascending: rows for validation; None without `val_size`


def training_data(config: DataConfig, split: Split) -> TrainingData:
    """Return what a recipe trains on, given the training split; UserError if a class is empty."""
    labels = split.labels.cpu()
    rows, val_rows = select_rows(config, labels)
    if config.label_noise:
        wrong = labels.clone()
        for part in (rows, val_rows):
            if part is not None:
                wrong[part] = noisy_labels(config.label_noise, split, part)
        split = replace(split, labels=wrong.to(split.labels.device))
    return TrainingData(split=split, rows=rows, val_rows=val_rows)


def describe_rows(config: DataConfig, original: Split, data: TrainingData) -> str | None:
    """Return how the training rows differ from the whole split; None if by the validation rows alone."""
    parts = []
    if config.subset != (1.0, None):
        counts = torch.bincount(original.labels.cpu()[data.rows])
        low, high = int(counts[counts > 0].min()), int(counts.max())
        per_class = f"{low}" if low == high else f"{low} to {high}"
        total = len(original.labels)
        parts.append(f"{len(data.rows):,} of {total:,} rows, {per_class} per class")
    if config.label_noise:
        rows = data.rows.to(original.labels.device)
        wrong = int((data.split.labels != original.labels)[rows].sum())
        parts.append(f"{wrong:,} labels are wrong ({config.label_noise.kind} noise)")
    return "; ".join(parts) or None


def select_rows(config: DataConfig, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the training rows, and the validation rows if there are any: ascending, int64.

    `labels` are those of the whole training split, int64 [N], without noise. The rows depend on them, on
    `fraction`, `long_tail` and `val_size` alone, so all seeds share them. A smaller fraction, a larger
    imbalance and fewer validation rows choose subsets.
    """
    labels = labels.cpu()
    rows = torch.arange(len(labels))
    if config.subset != (1.0, None):
        counts = subset_counts(config, torch.bincount(labels).tolist())
        rows = first_of_classes(labels, rows, counts, "subset")
    if not config.val_size:
        return rows, None
    return split_train_val(labels, config.val_size, rows)


def subset_counts(config: DataConfig, sizes: Sequence[int]) -> list[int]:
    """Return how many rows of each class `fraction` and then `long_tail` keep, given all classes' sizes.

    A class keeps round(fraction * n) of its n rows (half to even), at least one.
    """
    counts = [min(size, max(1, round(config.fraction * size))) for size in sizes]
    if config.long_tail is None:
        return counts
    imbalance, largest = config.long_tail.imbalance, max(counts)
    last = max(1, len(counts) - 1)
    tail = [
        min(count, int(largest / imbalance ** (index / last))) for index, count in enumerate(counts)
    ]
    if any(kept == 0 for kept, count in zip(tail, counts, strict=True) if count):
        raise UserError(
            f"data.long_tail.imbalance={imbalance:g}: leaves a class without rows, as the largest class "
            f"has {largest}; set it to at most {largest}"
        )
    return tail


def first_of_classes(
    labels: Tensor, rows: Tensor, counts: Sequence[int], *key: int | str
) -> Tensor:
    """Return the first `counts[c]` of `rows` of each class c, in an order that is drawn by a key.

    The order is one of all N `labels`, so that other `rows` and `counts` choose from the same one. The
    result is ascending, int64.
    """
    order = torch.randperm(len(labels), generator=generator(*key))
    order = order[torch.isin(order, rows)]
    order = order[torch.argsort(labels[order], stable=True)]
    classes = labels[order]
    position = torch.arange(len(order)) - torch.searchsorted(classes, classes)  # within the class
    return order[position < torch.tensor(counts)[classes]].sort().values


def split_train_val(
    labels: Tensor, val_size: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split `rows` (default: all) into training rows and `val_size` validation rows, ascending int64.

    Each class has the same number of validation rows.
    """
    labels = labels.cpu()
    rows = torch.arange(len(labels)) if rows is None else rows
    classes = int(labels.max()) + 1
    if val_size % classes or val_size >= len(rows):
        raise UserError(
            f"data.val_size={val_size}: must be a multiple of {classes} (the number of classes) "
            f"below {len(rows)} (the number of rows)"
        )
    per_class = val_size // classes
    smallest = int(torch.bincount(labels[rows], minlength=classes).min())
    if per_class >= smallest:
        raise UserError(
            f"data.val_size={val_size}: takes {per_class} rows of each class, but one class has only "
            f"{smallest}; lower it"
        )
    val_rows = first_of_classes(labels, rows, [per_class] * classes, "holdout")
    return rows[~torch.isin(rows, val_rows)], val_rows


def noisy_labels(noise: LabelNoise, split: Split, rows: Tensor) -> Tensor:
    """Return labels of `rows`, int64, with round(rate * n) wrong ones among the n rows of each class.

    A row that is wrong at some rate is wrong, with the same label, at all higher ones.
    """
    labels = split.labels.cpu()
    classes = int(labels.max()) + 1
    counts = [round(noise.rate * n) for n in torch.bincount(labels[rows]).tolist()]
    wrong = first_of_classes(labels, rows, counts, "label_noise", noise.seed)
    result = labels.clone()
    if noise.kind == "symmetric":
        draws = generator("noisy_label", noise.seed)
        offsets = torch.randint(1, classes, (len(labels),), generator=draws)
        result[wrong] = (labels + offsets)[wrong] % classes
    else:
        result[wrong] = next_classes(labels, split.coarse_labels)[labels[wrong]]
    return result[rows]


def next_classes(labels: Tensor, coarse_labels: Tensor | None) -> Tensor:
    """Return the next class of the same superclass for each class, in a circle, int64 [C].

    A class that is alone in its superclass has the next one of all classes. Without `coarse_labels`, all
    classes are in one superclass.
    """
    classes = int(labels.max()) + 1
    superclass = torch.zeros(classes, dtype=torch.int64)
    if coarse_labels is not None:
        superclass[labels] = coarse_labels
    following = (torch.arange(classes) + 1) % classes
    for index in superclass.unique():
        members = (superclass == index).nonzero().flatten()
        if len(members) > 1:
            following[members] = members.roll(-1)
    return following
