"""Tests of the evaluation scores against known values, scikit-learn, SciPy and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torchmetrics.classification import MulticlassCalibrationError

from cifar_dist.data.dataset import Hierarchy
from cifar_dist.evaluation import scores
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.report import build_report

LABELS = torch.tensor([0, 0, 1, 2, 3])
PREDICTED = torch.tensor([0, 1, 1, 3, 0])
COARSE = torch.tensor([0, 0, 1, 1])  # classes 0 and 1 are one superclass, 2 and 3 the other


def predictions(rows: int = 700, classes: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are mostly correct, and labels."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=stream)
    logits = torch.randn(rows, classes, generator=stream)
    logits[torch.arange(rows), labels] += 2.0
    return logits.double() * 3, labels


def test_confusion_and_superclass_scores_of_known_predictions() -> None:
    table = scores.confusion(LABELS, PREDICTED, 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert scores.merge_classes(table, COARSE, 2).tolist() == [[3, 0], [1, 1]]
    assert scores.superclass_scores(LABELS, PREDICTED, COARSE) == pytest.approx(
        {"superclass_top1": 80, "errors_inside_superclass": 40, "errors_outside_superclass": 20}
    )


def test_class_without_superclass_is_left_out() -> None:
    table = scores.confusion(LABELS, PREDICTED, 4)
    assert scores.merge_classes(table, torch.tensor([0, 0, 1, -1]), 2).tolist() == [[3, 0], [0, 0]]


def test_class_scores_of_known_predictions() -> None:
    first, second, third, _ = scores.class_scores(scores.confusion(LABELS, PREDICTED, 4))
    assert (first.recall, first.precision, first.f1) == (50, 50, 50)
    assert (first.most_confused_with, first.confused_count) == (1, 1)
    assert (second.recall, second.precision) == (100, 50)
    assert second.most_confused_with is None
    assert (third.recall, third.precision, third.f1) == (0, None, 0)
    empty = scores.class_scores(torch.zeros(2, 2, dtype=torch.int64))[0]
    assert (empty.count, empty.recall, empty.f1) == (0, None, None)


def test_class_scores_match_scikit_learn() -> None:
    logits, labels = predictions()
    predicted = logits.argmax(1)
    table = scores.confusion(labels, predicted, 20)
    assert (table.numpy() == sklearn_metrics.confusion_matrix(labels, predicted)).all()
    precision, recall, f1, count = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted
    )
    for index, ours in enumerate(scores.class_scores(table)):
        assert ours.precision == pytest.approx(100 * precision[index])
        assert ours.recall == pytest.approx(100 * recall[index])
        assert ours.f1 == pytest.approx(100 * f1[index])
        assert ours.count == count[index]
    metrics = classification_metrics(logits, labels)
    top5 = sklearn_metrics.top_k_accuracy_score(labels, logits, k=5)
    assert metrics["top5"] == pytest.approx(100 * top5)
    assert metrics["loss"] == pytest.approx(sklearn_metrics.log_loss(labels, logits.softmax(1)))


def test_reliability_of_known_predictions() -> None:
    """Two images at 0.9, one correct; one at 0.6, correct: |0.5 - 0.9| 2/3 + |1 - 0.6| 1/3."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]).log()
    coarse = scores.reliability(logits, torch.tensor([0, 1, 0]), bins=2)
    assert coarse.counts == [0, 3]
    assert coarse.confidence[0] is None
    assert coarse.confidence[1] == pytest.approx(80)
    assert coarse.top1[1] == pytest.approx(200 / 3)
    finer = scores.reliability(logits, torch.tensor([0, 1, 0]), bins=4)
    assert finer.ece == pytest.approx(100 * (0.4 * 2 / 3 + 0.4 / 3))


def test_confidence_one_is_in_the_last_bin() -> None:
    result = scores.reliability(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]), bins=10)
    assert result.counts == [0] * 9 + [1]


def test_calibration_error_matches_torchmetrics() -> None:
    logits, labels = predictions()
    for temperature in (0.3, 1.0, 4.0):
        oracle = MulticlassCalibrationError(20, n_bins=15, norm="l1")(logits / temperature, labels)
        ours = scores.reliability(logits / temperature, labels)
        assert ours.ece == pytest.approx(100 * oracle.item(), abs=1e-4)
        assert sum(ours.counts) == len(labels)


def test_temperature_maximizes_the_likelihood() -> None:
    logits, labels = predictions()
    fitted = scores.fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return classification_metrics(logits / temperature, labels)["loss"]

    assert loss(fitted) <= min(loss(fitted * 1.001), loss(fitted / 1.001))
    assert scores.fit_temperature(logits * 7, labels) == pytest.approx(7 * fitted, rel=1e-9)
    # Correct three times in four: softmax(z / T) is 3/4 at T = z / log 3.
    coin = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    known = scores.fit_temperature(coin, torch.tensor([0, 0, 0, 1]))
    assert known == pytest.approx(2 / math.log(3), rel=1e-9)
    # Always correct: the best temperature is the lower limit.
    assert scores.fit_temperature(coin, torch.zeros(4).long()) == pytest.approx(0.01)


def test_temperature_that_calibrates_worse_is_not_used() -> None:
    coin, labels = torch.tensor([[2.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
    assert scores.choose_temperature(coin, labels) == scores.fit_temperature(coin, labels)
    # The confidence of 60 % is right, but errors fall on a class with a probability of 1 %.
    sure = torch.tensor([[0.6, 0.39, 0.01]]).log().repeat(5, 1)
    labels = torch.tensor([0, 0, 0, 2, 2])
    assert scores.fit_temperature(sure, labels) > 1.5
    assert scores.choose_temperature(sure, labels) == 1
    hierarchy = Hierarchy(fine=("a", "b", "c"), coarse=("d",), coarse_of_fine=torch.zeros(3).long())
    result = EvalResult(metrics={}, logits=sure, labels=labels)
    report = build_report(result, hierarchy, val=result)
    assert report["temperature"]["value"] == 1
    assert (
        report["temperature"]["ece"] == report["calibration"]["ece"] == pytest.approx(0, abs=1e-4)
    )


@pytest.mark.parametrize(("rows", "hits"), [(1000, 700), (10_000, 3853), (23, 1), (50, 50), (7, 0)])
def test_bootstrap_interval_matches_resampling(rows: int, hits: int) -> None:
    correct = torch.arange(rows) < hits
    low, high = scores.bootstrap_interval(correct)
    exact = stats.binom(rows, hits / rows)
    assert (low, high) == (exact.ppf(0.025) / rows, exact.ppf(0.975) / rows)
    stream = torch.Generator().manual_seed(0)
    resamples = torch.stack(
        [
            correct[torch.randint(rows, (rows,), generator=stream)].double().mean()
            for _ in range(500)
        ]
    )
    sampled = resamples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [low, high] == pytest.approx(sampled, abs=1.0 / rows**0.5 / 5 + 1 / rows)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 3), (1, 9), (120, 80), (0, 1)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    both = [True, True, False]
    first = torch.tensor([True] * only_first + [False] * only_second + both)
    second = torch.tensor([False] * only_first + [True] * only_second + both)
    result = scores.mcnemar(first, second)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    flips = only_first + only_second
    oracle = stats.binomtest(only_first, flips).pvalue if flips else 1.0
    assert result.p == pytest.approx(oracle, rel=1e-9)
    assert scores.mcnemar(second, first).p == result.p


def test_mcnemar_of_many_disagreements_does_not_overflow() -> None:
    first = torch.arange(10_000) < 9_000
    assert scores.mcnemar(first, ~first).p < 1e-300
    assert scores.mcnemar(torch.arange(10_000) < 5_020, torch.arange(10_000) >= 5_020).p > 0.5


def test_holm_of_known_p_values() -> None:
    """0.01 x 3, 0.02 x 2, 0.9 x 1; at most 1 and monotonic."""
    assert scores.holm([0.9, 0.01, 0.02]) == pytest.approx([0.9, 0.03, 0.04])
    assert scores.holm([0.02, 0.021]) == pytest.approx([0.04, 0.04])
    assert scores.holm([0.9, 0.8]) == [1, 1]
    assert scores.holm([]) == []


def test_ties_are_ranked_as_in_argmax() -> None:
    """Logits of a bf16 head are often equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 10, generator=generator).round()
    labels = torch.randint(0, 10, (2000,), generator=generator)
    metrics = classification_metrics(logits, labels)
    correct = logits.argmax(1) == labels
    assert metrics["top1"] == pytest.approx(100 * correct.double().mean().item(), abs=1e-9)
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
    in_top5 = (order == labels[:, None]).any(1)
    assert metrics["top5"] == pytest.approx(100 * in_top5.double().mean().item(), abs=1e-9)


def test_nan_logits_are_never_correct() -> None:
    logits, labels = torch.full((3, 10), torch.nan), torch.zeros(3, dtype=torch.int64)
    assert classification_metrics(logits, labels)["top1"] == 0
