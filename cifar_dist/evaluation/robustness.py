"""Accuracy on corrupted test images, and detection of out-of-distribution images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSplit
from cifar_dist.data.dataset import Split
from cifar_dist.data.ingest.cifar_c import published_splits
from cifar_dist.utils.log import log, progress_bar

GENERATED = "generated"  # the corruptions are computed


def evaluate_corruptions(
    source: str, test: Split, top1_of: Callable[[Split], float], *, show_progress: bool
) -> dict[str, Any]:
    """Return `summarize_corruptions` of all kinds and severities.

    `source` is GENERATED or the folder of CIFAR-100-C, `top1_of` returns the accuracy on a split in
    percent.
    """
    splits: dict[tuple[str, int], Split]
    if source == GENERATED:
        splits = {
            (kind, severity): CorruptedSplit(
                images=test.images, labels=test.labels, kind=kind, severity=severity
            )
            for kind in CORRUPTIONS
            for severity in SEVERITIES
        }
    else:
        splits = published_splits(Path(source), test)
    top1: dict[str, list[float]] = {}
    bar = progress_bar(0, len(splits), enabled=show_progress, unit="corruption")
    for (kind, _), split in splits.items():
        top1.setdefault(kind, []).append(top1_of(split))
        bar.update()
    bar.close()
    return {
        "source": "generated, without frost" if source == GENERATED else "published files",
        **summarize_corruptions(top1),
    }


def summarize_corruptions(top1: dict[str, list[float]]) -> dict[str, Any]:
    """Return top-1 per kind and severity with its means, and the mean corruption error, in percent."""
    means = [sum(values) / len(values) for values in top1.values()]
    return {
        "top1": top1,
        "mean_top1": dict(zip(top1, means, strict=True)),
        "mean_corruption_error": 100 - sum(means) / len(means),
        "note": "the mean error over kinds and severities, not divided by that of AlexNet",
    }


def corruption_table(corruptions: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Return a row per kind and one of their means: top-1 of severities 1 to 5 and its mean."""
    top1 = corruptions["top1"]
    rows = [(kind, [*top1[kind], corruptions["mean_top1"][kind]]) for kind in top1]
    means = [sum(column) / len(rows) for column in zip(*(row for _, row in rows), strict=True)]
    return [*rows, ("mean", means)]


def ood_scores(logits: Tensor, other_logits: Tensor) -> dict[str, dict[str, float]]:
    """Return how well two scores separate the test images from those of another data set.

    `max_softmax` is the highest probability (Hendrycks and Gimpel 2017, arXiv 1610.02136), `energy` is
    log sum exp of the logits, the negative energy at temperature 1 (Liu et al. 2020, arXiv
    2010.03759). Both are computed in float64 from f32 [N, C] and [M, C].
    """
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "max_softmax": lambda values: values.double().softmax(1).amax(1),
        "energy": lambda values: values.double().logsumexp(1),
    }
    return {
        name: detection_metrics(score(logits), score(other_logits))
        for name, score in scores.items()
    }


def detection_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Return AUROC and the false positive rate at 95 % true positive rate, in percent.

    `inside` [N] and `outside` [M] are scores that should be higher inside. Exact: AUROC counts a tie
    as half, and the threshold is the highest score that at least 95 % of `inside` reach.
    """
    ordered, pairs = inside.sort().values, len(inside) * len(outside)
    below, not_above = (
        int(torch.searchsorted(ordered, outside, right=right).sum()) for right in (False, True)
    )
    reached = -(-95 * len(inside) // 100)  # rounded up
    threshold = ordered[len(inside) - reached]
    return {
        "auroc": 100 * (2 * pairs - below - not_above) / (2 * pairs),
        "fpr_at_95_tpr": 100 * int((outside >= threshold).sum()) / len(outside),
    }


def log_robustness(report: dict[str, Any]) -> None:
    """Log the table of corruptions and the detection of out-of-distribution images, if evaluated."""
    if corruptions := report.get("corruptions"):
        header = "".join(f"{severity:>7}" for severity in SEVERITIES)
        log.info(f"  corruptions ({corruptions['source']}), top1 in %")
        log.info(f"  {'severity':18}{header}   mean")
        for kind, row in corruption_table(corruptions):
            log.info(f"  {kind:18}{''.join(f'{value:7.2f}' for value in row)}")
        error = corruptions["mean_corruption_error"]
        log.info(f"  mean corruption error {error:.2f} % (not divided by that of AlexNet)")
    if ood := report.get("ood"):
        for name, label in ("max_softmax", "maximum softmax probability"), ("energy", "energy"):
            log.info(
                f"  out-of-distribution {ood['data']}, {label}: AUROC {ood[name]['auroc']:.2f} %  "
                f"FPR at 95 % TPR {ood[name]['fpr_at_95_tpr']:.2f} %"
            )
