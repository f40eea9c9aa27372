"""Losses that compare the rows of a micro-batch: numbers by hand, other people's code, who is charged."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor

from cifar_dist.losses.classification import LOSSES, Contrastive, SupCon, Triplet
from cifar_dist.losses.metric import positive_negative_masks
from cifar_dist.models.heads import Outputs

Metric = Triplet | Contrastive | SupCon
METRIC: list[Metric] = [
    Triplet(),
    Triplet(margin=None, normalize=False),
    Contrastive(),
    Contrastive(normalize=False, margin=3),
    SupCon(),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply(loss: Metric, embedding: Tensor, labels: Tensor) -> Tensor:
    rows, size = embedding.shape
    return loss(Outputs(embedding.new_zeros(rows, 5), embedding, torch.zeros(5, size)), labels)


ON_A_LINE, PAIRS = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 1])


def test_triplet_by_hand() -> None:
    # (farthest of the class, nearest of the other): (1, 3), (1, 2), (4, 2), (4, 6).
    found = apply(Triplet(margin=1.5, normalize=False), ON_A_LINE, PAIRS)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 3.5, 0.0]))
    soft = apply(Triplet(margin=None, normalize=False), ON_A_LINE, PAIRS)
    differences = torch.tensor([-2.0, -1.0, 2.0, -2.0])
    torch.testing.assert_close(soft, differences.exp().log1p())


def test_contrastive_by_hand() -> None:
    # Half the squares to the class: 1/2, 1/2, 8, 8. What lacks of 4 to the others, of which there
    # are two: (1, 0), (2, 0), (1, 2), (0, 0).
    found = apply(Contrastive(margin=4, normalize=False), ON_A_LINE, PAIRS)
    wanted = torch.tensor([0.5 + 1 / 4, 0.5 + 4 / 4, 8 + 5 / 4, 8])
    torch.testing.assert_close(found, wanted)


def test_supcon_by_hand() -> None:
    # Directions at 0, 60 and 90 degrees, of other lengths; the third has no partner.
    angle = torch.tensor([0, math.pi / 3, math.pi / 2])
    embedding = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [2.0], [5.0]])
    found = apply(SupCon(temperature=0.5), embedding, torch.tensor([4, 4, 2]))
    near, far = math.exp(0.5 / 0.5), math.exp(math.cos(math.pi / 6) / 0.5)
    wanted = torch.tensor([-math.log(near / (near + 1)), -math.log(near / (near + far)), 0.0])
    torch.testing.assert_close(found, wanted)


def test_partners_are_other_rows() -> None:
    same, other = positive_negative_masks(torch.tensor([3, 1, 3]))
    assert same.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert other.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_an_anchor_without_a_partner_is_charged_nothing(loss: Metric) -> None:
    embedding = numbers(6, 4).requires_grad_()
    found = apply(loss, embedding, torch.tensor([0, 1, 0, 2, 2, 3]))
    assert found[[1, 5]].tolist() == [0, 0]
    assert (found[[0, 2, 3, 4]] > 0).any()
    for rows in (1, 6):  # a micro-batch of one row; all classes differ
        few = embedding[:rows]
        nothing = apply(loss, few, torch.arange(rows))
        (gradient,) = torch.autograd.grad(nothing.sum(), embedding)
        assert torch.equal(nothing, torch.zeros(rows))
        assert torch.equal(gradient, torch.zeros(6, 4))


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_one_class_alone(loss: Metric) -> None:
    embedding = numbers(6, 4).requires_grad_()
    found = apply(loss, embedding, torch.zeros(6, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(found.sum(), embedding)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    if isinstance(loss, Triplet):  # nobody to keep away from
        assert torch.equal(found, torch.zeros(6))


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_the_order_of_the_rows_and_the_names_of_the_classes_do_not_matter(loss: Metric) -> None:
    embedding, labels = numbers(24, 8), torch.arange(24) % 7
    found, rows = apply(loss, embedding, labels), torch.randperm(24)
    torch.testing.assert_close(apply(loss, embedding[rows], labels[rows]), found[rows])
    torch.testing.assert_close(apply(loss, embedding, 90 - 3 * labels), found)


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_turning_all_embeddings_changes_nothing(loss: Metric) -> None:
    embedding, labels = numbers(24, 8), torch.arange(24) % 7
    found, turn = apply(loss, embedding, labels), torch.linalg.qr(numbers(8, 8, seed=1))[0]
    torch.testing.assert_close(apply(loss, embedding @ turn, labels), found, rtol=1e-4, atol=1e-5)
    longer = apply(loss, 5 * embedding, labels)
    if isinstance(loss, SupCon) or loss.normalize:
        torch.testing.assert_close(longer, found)
    else:
        shifted = apply(loss, embedding + 2, labels)
        torch.testing.assert_close(shifted, found, rtol=1e-4, atol=1e-5)
        assert (longer - found).abs().max() > 0.1


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_classes_that_lie_apart_cost_little(loss: Metric) -> None:
    labels = torch.arange(12) % 3
    apart = 10 * torch.eye(3)[labels] + 0.01 * numbers(12, 3)
    mixed = 10 * torch.eye(3)[labels[torch.randperm(12)]] + 0.01 * numbers(12, 3)
    far, near = apply(loss, apart, labels).mean(), apply(loss, mixed, labels).mean()
    # SupCon cannot be 0: three partners share the probability.
    assert far < (math.log(3) + 0.01 if isinstance(loss, SupCon) else 0.01)
    assert near > far + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_finite_for_rows_that_coincide_and_for_none(loss: Metric, dtype: torch.dtype) -> None:
    row = numbers(1, 4)
    given = torch.cat([row, row, row, 2 * row, -row, 0 * row, 0 * row, 1e-20 * row]).to(dtype)
    given.requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(loss, given, labels)
    (gradient,) = torch.autograd.grad(found.sum(), given)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert torch.equal(found, apply(loss, given.float(), labels))


@pytest.mark.parametrize("loss", METRIC, ids=repr)
def test_the_gradient_is_that_of_the_formula(loss: Metric) -> None:
    embedding = numbers(8, 4).double().requires_grad_()
    labels = torch.arange(8) % 3
    assert torch.autograd.gradcheck(lambda x: loss.per_anchor(x, labels), embedding)


def test_every_metric_loss_is_tested_here() -> None:
    assert {type(loss) for loss in METRIC} == {
        k for k in LOSSES.values() if not k.trains_classifier
    }


# ------------------------------------------------------------------ pytorch-metric-learning's
# It averages over the pairs, triplets or anchors that it finds, by default only over those that cost
# something, where we divide by all rows; its reducers are turned off here. Labels that all have
# partners, so that it leaves out no anchor.

LABELS = torch.arange(24) % 7


def assert_same_with_gradient(loss: Metric, wanted_at: Tensor, wanted: Tensor) -> None:
    found_at = wanted_at.detach().clone().requires_grad_()
    found = apply(loss, found_at, LABELS)
    torch.testing.assert_close(found, wanted)
    (found_gradient,) = torch.autograd.grad(found.sum(), found_at)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wanted_at)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("margin", [0.2, None])
def test_triplet_is_pytorch_metric_learnings_with_its_batch_hard_miner(
    margin: float | None, normalize: bool
) -> None:
    embedding = numbers(24, 8).requires_grad_()
    distance = LpDistance(normalize_embeddings=normalize)
    oracle = TripletMarginLoss(
        margin=margin or 0,
        smooth_loss=margin is None,
        distance=distance,
        reducer=DoNothingReducer(),
    )
    mined = BatchHardMiner(distance=distance)(embedding, LABELS)
    wanted = oracle(embedding, LABELS, mined)["loss"]["losses"]
    assert torch.equal(mined[0], torch.arange(24))
    assert_same_with_gradient(Triplet(margin=margin, normalize=normalize), embedding, wanted)


@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_is_pytorch_metric_learnings_squared(normalize: bool) -> None:
    """It charges a pair d or margin - d, without Hadsell's square and half."""
    embedding, margin = numbers(24, 8).requires_grad_(), 1.0 if normalize else 4.0
    oracle = ContrastiveLoss(
        pos_margin=0,
        neg_margin=margin,
        distance=LpDistance(normalize_embeddings=normalize),
        reducer=DoNothingReducer(),
    )
    wanted = torch.zeros(24)
    for part in oracle(embedding, LABELS).values():
        anchors = part["indices"][0]
        sums = torch.zeros(24).index_add(0, anchors, part["losses"].square() / 2)
        wanted = wanted + sums / anchors.bincount(minlength=24)
    assert_same_with_gradient(Contrastive(margin=margin, normalize=normalize), embedding, wanted)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_supcon_is_pytorch_metric_learnings(temperature: float) -> None:
    embedding = numbers(24, 8).requires_grad_()
    oracle = SupConLoss(temperature=temperature, reducer=DoNothingReducer())
    wanted = oracle(embedding, LABELS)["loss"]["losses"]
    assert_same_with_gradient(SupCon(temperature=temperature), embedding, wanted)
