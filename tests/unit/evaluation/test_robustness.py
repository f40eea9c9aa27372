"""Detection of out-of-distribution images against scikit-learn; means of corruptions."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from cifar_dist.evaluation.robustness import (
    corruption_table,
    detection_metrics,
    ood_scores,
    summarize_corruptions,
)


@pytest.mark.parametrize("levels", [2, 7, 100_000])  # few levels: many ties
@pytest.mark.parametrize("sizes", [(1, 1), (19, 3), (20, 40), (1000, 313)])
def test_detection_metrics_match_scikit_learn(levels: int, sizes: tuple[int, int]) -> None:
    stream = torch.Generator().manual_seed(levels)
    inside = torch.randint(levels, (sizes[0],), generator=stream).double() + levels // 3
    outside = torch.randint(levels, (sizes[1],), generator=stream).double()
    is_inside = torch.arange(sum(sizes)) < sizes[0]
    scores = torch.cat([inside, outside])
    false, true, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    metrics = detection_metrics(inside, outside)
    assert metrics["auroc"] == pytest.approx(100 * roc_auc_score(is_inside, scores))
    enough = true * sizes[0] >= 0.95 * sizes[0] - 1e-9
    assert metrics["fpr_at_95_tpr"] == pytest.approx(100 * false[enough].min())


def test_scores_of_known_logits() -> None:
    """Both data sets are equally confident, but the energy of the second is lower throughout."""
    logits = torch.tensor([[5.0, 0.0], [0.0, 4.0], [3.0, 0.0]])
    scores = ood_scores(logits, logits - 9)
    assert scores["max_softmax"]["auroc"] == pytest.approx(50)
    assert scores["max_softmax"]["fpr_at_95_tpr"] == 100
    assert scores["energy"] == {"auroc": 100, "fpr_at_95_tpr": 0}


def test_mean_corruption_error_is_over_kinds_and_severities() -> None:
    summary = summarize_corruptions({"fog": [90, 80, 70, 60, 50], "snow": [50, 40, 30, 20, 10]})
    assert summary["mean_top1"] == {"fog": 70, "snow": 30}
    assert summary["mean_corruption_error"] == 50
    assert corruption_table(summary)[-1] == ("mean", [70, 60, 50, 40, 30, 50])
