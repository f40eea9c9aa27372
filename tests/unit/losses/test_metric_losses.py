"""Metric losses against hand-computed values and other implementations, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from outputs import randn
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor

from cifar_dist.losses.metric import (
    Contrastive,
    PairLoss,
    SupCon,
    Triplet,
    positive_negative_masks,
)
from cifar_dist.losses.registry import LOSSES
from cifar_dist.models.heads import Outputs

LOSSES_TESTED: list[PairLoss] = [
    Triplet(),
    Triplet(margin=None, normalize=False),
    Contrastive(),
    Contrastive(normalize=False, margin=3),
    SupCon(),
]


def apply(loss: PairLoss, embedding: Tensor, labels: Tensor) -> Tensor:
    rows, size = embedding.shape
    return loss(Outputs(embedding.new_zeros(rows, 5), embedding, torch.zeros(5, size)), labels)


ON_A_LINE, PAIRS = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 1])


def test_triplet_hand_computed() -> None:
    # (farthest positive, nearest negative): (1, 3), (1, 2), (4, 2), (4, 6).
    result = apply(Triplet(margin=1.5, normalize=False), ON_A_LINE, PAIRS)
    torch.testing.assert_close(result, torch.tensor([0.0, 0.5, 3.5, 0.0]))
    soft = apply(Triplet(margin=None, normalize=False), ON_A_LINE, PAIRS)
    differences = torch.tensor([-2.0, -1.0, 2.0, -2.0])
    torch.testing.assert_close(soft, differences.exp().log1p())


def test_contrastive_hand_computed() -> None:
    # Half the squared distance to the positive: 1/2, 1/2, 8, 8. Shortfall of 4 to the two negatives:
    # (1, 0), (2, 0), (1, 2), (0, 0).
    result = apply(Contrastive(margin=4, normalize=False), ON_A_LINE, PAIRS)
    expected = torch.tensor([0.5 + 1 / 4, 0.5 + 4 / 4, 8 + 5 / 4, 8])
    torch.testing.assert_close(result, expected)


def test_supcon_hand_computed() -> None:
    # Directions at 0, 60 and 90 degrees, of different lengths; the third has no positive.
    angle = torch.tensor([0, math.pi / 3, math.pi / 2])
    embedding = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [2.0], [5.0]])
    result = apply(SupCon(temperature=0.5), embedding, torch.tensor([4, 4, 2]))
    near, far = math.exp(0.5 / 0.5), math.exp(math.cos(math.pi / 6) / 0.5)
    expected = torch.tensor([-math.log(near / (near + 1)), -math.log(near / (near + far)), 0.0])
    torch.testing.assert_close(result, expected)


def test_a_row_is_not_its_own_positive() -> None:
    same, other = positive_negative_masks(torch.tensor([3, 1, 3]))
    assert same.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert other.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_an_anchor_without_a_positive_has_loss_zero(loss: PairLoss) -> None:
    embedding = randn(6, 4).requires_grad_()
    result = apply(loss, embedding, torch.tensor([0, 1, 0, 2, 2, 3]))
    assert result[[1, 5]].tolist() == [0, 0]
    assert (result[[0, 2, 3, 4]] > 0).any()
    for rows in (1, 6):  # a micro-batch of one row; all classes differ
        few = embedding[:rows]
        unpaired = apply(loss, few, torch.arange(rows))
        (gradient,) = torch.autograd.grad(unpaired.sum(), embedding)
        assert torch.equal(unpaired, torch.zeros(rows))
        assert torch.equal(gradient, torch.zeros(6, 4))


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_a_micro_batch_of_one_class_is_finite(loss: PairLoss) -> None:
    embedding = randn(6, 4).requires_grad_()
    result = apply(loss, embedding, torch.zeros(6, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(result.sum(), embedding)
    assert result.isfinite().all()
    assert gradient.isfinite().all()
    if isinstance(loss, Triplet):  # no negatives
        assert torch.equal(result, torch.zeros(6))


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_permuting_rows_permutes_and_renaming_classes_keeps_the_losses(loss: PairLoss) -> None:
    embedding, labels = randn(24, 8), torch.arange(24) % 7
    result, rows = apply(loss, embedding, labels), torch.randperm(24)
    torch.testing.assert_close(apply(loss, embedding[rows], labels[rows]), result[rows])
    torch.testing.assert_close(apply(loss, embedding, 90 - 3 * labels), result)


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_losses_are_invariant_to_rotation(loss: PairLoss) -> None:
    embedding, labels = randn(24, 8), torch.arange(24) % 7
    result, rotation = apply(loss, embedding, labels), torch.linalg.qr(randn(8, 8, seed=1))[0]
    torch.testing.assert_close(
        apply(loss, embedding @ rotation, labels), result, rtol=1e-4, atol=1e-5
    )
    longer = apply(loss, 5 * embedding, labels)
    if getattr(loss, "normalize", True):
        torch.testing.assert_close(longer, result)
    else:
        shifted = apply(loss, embedding + 2, labels)
        torch.testing.assert_close(shifted, result, rtol=1e-4, atol=1e-5)
        assert (longer - result).abs().max() > 0.1


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_separated_classes_have_a_small_loss(loss: PairLoss) -> None:
    labels = torch.arange(12) % 3
    apart = 10 * torch.eye(3)[labels] + 0.01 * randn(12, 3)
    mixed = 10 * torch.eye(3)[labels[torch.randperm(12)]] + 0.01 * randn(12, 3)
    far, near = apply(loss, apart, labels).mean(), apply(loss, mixed, labels).mean()
    # SupCon cannot be 0: three positives share the probability.
    assert far < (math.log(3) + 0.01 if isinstance(loss, SupCon) else 0.01)
    assert near > far + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_finite_for_identical_and_zero_embeddings(loss: PairLoss, dtype: torch.dtype) -> None:
    row = randn(1, 4)
    embedding = torch.cat([row, row, row, 2 * row, -row, 0 * row, 0 * row, 1e-20 * row]).to(dtype)
    embedding.requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        result = apply(loss, embedding, labels)
    (gradient,) = torch.autograd.grad(result.sum(), embedding)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert gradient.isfinite().all()
    assert torch.equal(result, apply(loss, embedding.float(), labels))


@pytest.mark.parametrize("loss", LOSSES_TESTED, ids=repr)
def test_gradient_matches_finite_differences(loss: PairLoss) -> None:
    embedding = randn(8, 4).double().requires_grad_()
    labels = torch.arange(8) % 3
    assert torch.autograd.gradcheck(lambda x: loss.per_anchor(x, labels), embedding)


def test_every_metric_loss_is_in_this_file() -> None:
    assert {type(loss) for loss in LOSSES_TESTED} == {
        k for k in LOSSES.values() if not k.trains_classifier
    }


# ------------------------------------------------------------------ pytorch-metric-learning
# By default it averages over the pairs, triplets or anchors with a positive loss, where cifar_dist
# divides by all rows; its reducers are off here. Every label occurs at least three times, so that it
# skips no anchor.

LABELS = torch.arange(24) % 7


def assert_same_value_and_gradient(
    loss: PairLoss, oracle_embedding: Tensor, expected: Tensor
) -> None:
    embedding = oracle_embedding.detach().clone().requires_grad_()
    result = apply(loss, embedding, LABELS)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), embedding)
    (oracle_gradient,) = torch.autograd.grad(expected.sum(), oracle_embedding)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("margin", [0.2, None])
def test_triplet_matches_pytorch_metric_learning_with_batch_hard_miner(
    margin: float | None, normalize: bool
) -> None:
    embedding = randn(24, 8).requires_grad_()
    distance = LpDistance(normalize_embeddings=normalize)
    oracle = TripletMarginLoss(
        margin=margin or 0,
        smooth_loss=margin is None,
        distance=distance,
        reducer=DoNothingReducer(),
    )
    mined = BatchHardMiner(distance=distance)(embedding, LABELS)
    expected = oracle(embedding, LABELS, mined)["loss"]["losses"]
    assert torch.equal(mined[0], torch.arange(24))
    assert_same_value_and_gradient(Triplet(margin=margin, normalize=normalize), embedding, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_matches_pytorch_metric_learning_squared(normalize: bool) -> None:
    """Its loss of a pair is d or margin - d, without the square and the half of Hadsell et al."""
    embedding, margin = randn(24, 8).requires_grad_(), 1.0 if normalize else 4.0
    oracle = ContrastiveLoss(
        pos_margin=0,
        neg_margin=margin,
        distance=LpDistance(normalize_embeddings=normalize),
        reducer=DoNothingReducer(),
    )
    expected = torch.zeros(24)
    for part in oracle(embedding, LABELS).values():
        anchors = part["indices"][0]
        sums = torch.zeros(24).index_add(0, anchors, part["losses"].square() / 2)
        expected = expected + sums / anchors.bincount(minlength=24)
    assert_same_value_and_gradient(
        Contrastive(margin=margin, normalize=normalize), embedding, expected
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_supcon_matches_pytorch_metric_learning(temperature: float) -> None:
    embedding = randn(24, 8).requires_grad_()
    oracle = SupConLoss(temperature=temperature, reducer=DoNothingReducer())
    expected = oracle(embedding, LABELS)["loss"]["losses"]
    assert_same_value_and_gradient(SupCon(temperature=temperature), embedding, expected)
