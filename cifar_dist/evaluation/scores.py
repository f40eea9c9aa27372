"""Confusion, calibration, confidence intervals and paired tests of predictions, on the CPU.

Everywhere `logits` is float [N, C] and `labels` and `predicted` are int64 [N]. Percentages are 0 to
100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RELIABILITY_BINS = 15


def percent(values: Tensor) -> float:
    """Return the mean of bool values as a percentage."""
    return 100.0 * values.double().mean().item()


# ----------------------------------------------------------------------------- classes


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix, int64 [C, C]: a row per true class, a column per prediction."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def merge_classes(table: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Return the confusion matrix of groups of classes, int64 [G, G].

    `group_of` is int64 [C]; a class with group -1 is left out.
    """
    member = F.one_hot(group_of + 1, groups + 1)[:, 1:]  # [C, G]
    return member.T @ table @ member


def superclass_scores(
    labels: Tensor, predicted: Tensor, coarse_of_fine: Tensor
) -> dict[str, float]:
    """Return superclass accuracy and the errors inside and outside the true superclass, in percent.

    superclass_top1 = top1 + errors_inside_superclass, and the two kinds of errors add up to
    100 - top1.
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
    """Scores of one class; None where the denominator would be zero."""

    count: int
    recall: float | None  # percent of its images that are predicted correctly: the class's top-1
    precision: float | None  # percent of the predictions of this class that are correct
    f1: float | None
    most_confused_with: int | None  # the most frequent wrong prediction for its images
    confused_count: int


def class_scores(table: Tensor) -> list[ClassScores]:
    """Return the scores of each class of a confusion matrix, in class order."""
    hits, counts, predictions = table.diagonal(), table.sum(1), table.sum(0)
    wrong = table - torch.diag(hits)
    scores = []
    for index in range(len(table)):
        correct, count, predicted = (int(values[index]) for values in (hits, counts, predictions))
        confused_count = int(wrong[index].max())
        scores.append(
            ClassScores(
                count=count,
                recall=100 * correct / count if count else None,
                precision=100 * correct / predicted if predicted else None,
                f1=200 * correct / (count + predicted) if count + predicted else None,
                most_confused_with=int(wrong[index].argmax()) if confused_count else None,
                confused_count=confused_count,
            )
        )
    return scores


# ----------------------------------------------------------------------------- calibration


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Accuracy per confidence bin; bins have equal width, and the means of empty bins are None."""

    counts: list[int]
    confidence: list[float | None]  # mean probability of the predicted class, percent
    top1: list[float | None]

    @property
    def ece(self) -> float:
        """Expected calibration error, percent (Guo et al. 2017, arXiv 1706.04599)."""
        gaps = [
            count * abs(confidence - top1)
            for count, confidence, top1 in zip(self.counts, self.confidence, self.top1, strict=True)
            if confidence is not None and top1 is not None
        ]
        return math.fsum(gaps) / sum(self.counts)


def reliability(logits: Tensor, labels: Tensor, bins: int = RELIABILITY_BINS) -> Reliability:
    """Return the accuracy per confidence bin."""
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_index = (confidence * bins).long().clamp(max=bins - 1)

    def sums(values: Tensor) -> list[float]:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_index, values).tolist()

    counts = sums(torch.ones_like(confidence))
    mean_confidence, mean_top1 = (
        [
            100 * total / count if count else None
            for total, count in zip(totals, counts, strict=True)
        ]
        for totals in (sums(confidence), sums((predicted == labels).double()))
    )
    return Reliability(
        counts=[int(count) for count in counts], confidence=mean_confidence, top1=mean_top1
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T in [0.01, 100] that maximizes the likelihood of softmax(logits / T).

    The log-likelihood is concave in 1 / T, so bisection finds the zero of its derivative.
    """
    logits = logits.double()
    target = logits.gather(1, labels[:, None]).mean()
    low, high = -math.log(100), math.log(100)  # of log(1 / T)
    for _ in range(50):
        middle = (low + high) / 2
        weights = (logits * math.exp(middle)).softmax(1)
        overconfident = (weights * logits).sum(1).mean() > target
        low, high = (low, middle) if overconfident else (middle, high)
    return math.exp(-(low + high) / 2)


def choose_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T of `fit_temperature`, or 1 if it makes the calibration error of these rows larger.

    The least loss does not imply a smaller calibration error, least of all with few rows.
    """
    fitted = fit_temperature(logits, labels)
    is_worse = reliability(logits / fitted, labels).ece > reliability(logits, labels).ece
    return 1.0 if is_worse else fitted


# ----------------------------------------------------------------------------- significance


def bootstrap_interval(correct: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of the mean of bool [N], as fractions.

    Exact in the limit of many resamples: the number of True values in a resample is binomial, so
    no resampling is needed.
    """
    rows, share = len(correct), float(correct.double().mean())
    if share in (0, 1):
        return share, share
    count = torch.arange(rows + 1, dtype=torch.float64)
    log_binomial = (
        (count.new_tensor(rows + 1)).lgamma() - (count + 1).lgamma() - (rows - count + 1).lgamma()
    )
    probability = (
        log_binomial + count * math.log(share) + (rows - count) * math.log1p(-share)
    ).exp()
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.searchsorted(probability.cumsum(0), tails).tolist()
    return low / rows, high / rows


@dataclass(frozen=True, kw_only=True)
class McNemar:
    only_first: int  # images that only the first model predicts correctly
    only_second: int
    p: float  # two-sided, exact


def mcnemar(first_correct: Tensor, second_correct: Tensor) -> McNemar:
    """Test whether two models differ on the same images, given bool [N] each (McNemar 1947).

    Exact: under the null hypothesis each disagreement is a fair coin flip.
    """
    first = int((first_correct & ~second_correct).sum())
    second = int((second_correct & ~first_correct).sum())
    flips, tail = first + second, min(first, second)
    coefficient, total = 1, 0  # C(flips, k) and the sum of C(flips, 0..tail)
    for k in range(tail + 1):
        total += coefficient
        coefficient = coefficient * (flips - k) // (k + 1)
    p = 1.0 if first == second else total / 2 ** (flips - 1)
    return McNemar(only_first=first, only_second=second, p=p)


def holm(p_values: list[float]) -> list[float]:
    """Return the p-values adjusted for multiple tests (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
