"""Logits and labels -> what they are worth: pure functions on the CPU, percentages from 0 to 100.

Everywhere `logits` is float [N, C], `labels` and `predicted` are int64 [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RELIABILITY_BINS = 15


def percent(values: Tensor) -> float:
    return 100.0 * values.double().mean().item()


# ----------------------------------------------------------------------------- classes


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: how many pictures of the row's class were taken for the column's."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def merge_classes(table: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """A confusion of classes as one of their groups, int64 [G, G]; -1 in `group_of`: in no group."""
    member = F.one_hot(group_of + 1, groups + 1)[:, 1:]  # [C, G]
    return member.T @ table @ member


def superclass_scores(
    labels: Tensor, predicted: Tensor, coarse_of_fine: Tensor
) -> dict[str, float]:
    """How often the predicted class lies in the right superclass, and on which side the errors fall.

    superclass_top1 = top1 + errors_inside_superclass; all errors = those inside + those outside.
    """
    same = coarse_of_fine[labels] == coarse_of_fine[predicted]
    wrong = labels != predicted
    return {
        "superclass_top1": percent(same),
        "errors_inside_superclass": percent(wrong & same),
        "errors_outside_superclass": percent(wrong & ~same),
    }


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class; None where nothing would be divided by nothing."""

    count: int
    recall: float | None  # percent of its pictures that were recognised: the class's top-1
    precision: float | None  # percent of what was called so that is so
    f1: float | None
    most_confused_with: int | None  # the class that its pictures were most often taken for
    confused_count: int  # how often


def class_scores(table: Tensor) -> list[ClassScores]:
    """Each class's scores out of a confusion, in the order of the classes."""
    right, pictures, called = table.diagonal(), table.sum(1), table.sum(0)
    wrong = table - torch.diag(right)
    scores = []
    for place in range(len(table)):
        hits, shown, said = (int(count[place]) for count in (right, pictures, called))
        mistaken = int(wrong[place].max())
        scores.append(
            ClassScores(
                count=shown,
                recall=100 * hits / shown if shown else None,
                precision=100 * hits / said if said else None,
                f1=200 * hits / (shown + said) if shown + said else None,
                most_confused_with=int(wrong[place].argmax()) if mistaken else None,
                confused_count=mistaken,
            )
        )
    return scores


# ----------------------------------------------------------------------------- probabilities


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins of equal width over the confidence 0 ... 1; means are None in a bin without a picture."""

    counts: list[int]
    confidence: list[float | None]  # mean probability of the predicted class, percent
    top1: list[float | None]

    @property
    def ece(self) -> float:
        """Expected calibration error, percent (Guo et al. 2017, arXiv 1706.04599)."""
        gaps = [
            count * abs(said - right)
            for count, said, right in zip(self.counts, self.confidence, self.top1, strict=True)
            if said is not None and right is not None
        ]
        return math.fsum(gaps) / sum(self.counts)


def reliability(logits: Tensor, labels: Tensor, bins: int = RELIABILITY_BINS) -> Reliability:
    """How right the model is where it is how sure."""
    sure, predicted = logits.double().softmax(1).max(1)
    place = (sure * bins).long().clamp(max=bins - 1)

    def sums(values: Tensor) -> list[float]:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values).tolist()

    counts = sums(torch.ones_like(sure))
    means = [
        [
            100 * total / count if count else None
            for total, count in zip(totals, counts, strict=True)
        ]
        for totals in (sums(sure), sums((predicted == labels).double()))
    ]
    return Reliability(counts=[int(n) for n in counts], confidence=means[0], top1=means[1])


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in 0.01 ... 100 for which softmax(logits / T) gives the labels the largest likelihood.

    The likelihood's slope over 1 / T falls, so halving an interval finds its zero.
    """
    logits = logits.double()
    target = logits.gather(1, labels[:, None]).mean()
    low, high = -math.log(100), math.log(100)  # of log(1 / T)
    for _ in range(50):
        middle = (low + high) / 2
        weights = (logits * math.exp(middle)).softmax(1)
        too_sure = (weights * logits).sum(1).mean() > target
        low, high = (low, middle) if too_sure else (middle, high)
    return math.exp(-(low + high) / 2)


# ----------------------------------------------------------------------------- how sure we are


def bootstrap_interval(correct: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap's interval of the share of True in bool [N], in the limit of many resamples.

    The number of True in a resample of the rows is binomial, so nothing needs to be drawn.
    """
    rows, share = len(correct), float(correct.double().mean())
    if share in (0, 1):
        return share, share
    count = torch.arange(rows + 1, dtype=torch.float64)
    ways = (
        (count.new_tensor(rows + 1)).lgamma() - (count + 1).lgamma() - (rows - count + 1).lgamma()
    )
    chance = (ways + count * math.log(share) + (rows - count) * math.log1p(-share)).exp()
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.searchsorted(chance.cumsum(0), tails).tolist()
    return low / rows, high / rows


@dataclass(frozen=True, kw_only=True)
class McNemar:
    only_first: int  # pictures that the first alone has right
    only_second: int
    p: float  # two-sided, exact


def mcnemar(first_correct: Tensor, second_correct: Tensor) -> McNemar:
    """Whether two models, on the same pictures (bool [N]), differ beyond chance (McNemar 1947).

    Exact: under the hypothesis the pictures on which they disagree are fair coins.
    """
    first = int((first_correct & ~second_correct).sum())
    second = int((second_correct & ~first_correct).sum())
    flips, tail = first + second, min(first, second)
    ways, total = 1, 0  # of choosing k of the flips; their sum up to the tail
    for k in range(tail + 1):
        total += ways
        ways = ways * (flips - k) // (k + 1)
    p = 1.0 if first == second else total / 2 ** (flips - 1)
    return McNemar(only_first=first, only_second=second, p=p)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for so many tests at once (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
