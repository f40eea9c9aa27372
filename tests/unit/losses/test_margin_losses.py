"""Margin losses against hand-computed values and other implementations, and properties at all angles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from outputs import randn
from pytorch_metric_learning.losses import CosFaceLoss, LargeMarginSoftmaxLoss, SphereFaceLoss
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.margin import (
    ArcFace,
    CosFace,
    LargeMarginSoftmax,
    MarginLoss,
    SphereFace,
    psi,
)
from cifar_dist.models.heads import CosineHead, LinearHead, Outputs

MARGINS: list[MarginLoss] = [
    ArcFace(),
    ArcFace(straight_through=True),
    CosFace(),
    SphereFace(),
    SphereFace(margin=3, lambda_=0),
    SphereFace(margin=2, lambda_=1, scale=16),
    LargeMarginSoftmax(),
    LargeMarginSoftmax(margin=4, lambda_=0),
]
ZERO_MARGIN: list[MarginLoss] = [
    ArcFace(margin=0),
    CosFace(margin=0),
    SphereFace(margin=1, lambda_=0),
    SphereFace(margin=1, scale=16),
    LargeMarginSoftmax(margin=1),
]


def outputs_of(loss: MarginLoss, embedding: Tensor, weight: Tensor, bias: float = 0.0) -> Outputs:
    """Return the outputs of the head that the loss needs; embedding [B, D], weight [C, D]."""
    if loss.head == "linear":
        return Outputs(embedding @ weight.T + bias, embedding, weight)
    class_weight = F.normalize(weight)
    return Outputs(F.normalize(embedding) @ class_weight.T, embedding, class_weight)


def at_angles(
    loss: MarginLoss, theta: Tensor, *, length: float = 2.0, width: float = 1.0
) -> Outputs:
    """Return embeddings at angle `theta` to class 0 and 90 degrees to class 1."""
    embedding = length * torch.stack([theta.cos(), torch.zeros_like(theta), theta.sin()], 1)
    return outputs_of(loss, embedding, torch.eye(3, dtype=theta.dtype)[:2] * width)


def zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


SIXTY = torch.tensor([math.pi / 3])


@pytest.mark.parametrize(
    ("loss", "true_logit"),
    [
        (CosFace(scale=4, margin=0.25), 4 * (0.5 - 0.25)),
        (SphereFace(margin=2, lambda_=0), 2 * -0.5),  # cos 120 degrees, length 2
        (SphereFace(margin=4, lambda_=0), 2 * -1.5),  # past 45 degrees: -cos 240 degrees - 2
        (SphereFace(margin=4, lambda_=3), 2 * (3 * 0.5 - 1.5) / 4),
        (SphereFace(margin=2, lambda_=0, scale=8), 8 * -0.5),
        (LargeMarginSoftmax(margin=2, lambda_=0), 2 * 3 * -0.5),  # lengths 2 and 3
        (LargeMarginSoftmax(margin=3, lambda_=1), 2 * 3 * (0.5 - 1) / 2),
    ],
    ids=repr,
)
def test_hand_computed_at_60_degrees(loss: MarginLoss, true_logit: float) -> None:
    result = loss(at_angles(loss, SIXTY, width=3), zeros(1))
    assert result.item() == pytest.approx(math.log1p(math.exp(-true_logit)), abs=1e-5)


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
def test_psi_matches_the_paper_and_decreases_continuously(margin: int) -> None:
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    result = psi(theta.cos(), margin)
    folds = (theta * margin / math.pi).floor().clamp(max=margin - 1)
    torch.testing.assert_close(result, (-1) ** folds * (margin * theta).cos() - 2 * folds)
    corners = torch.arange(margin + 1) * math.pi / margin
    torch.testing.assert_close(psi(corners.cos(), margin), 1 - 2 * torch.arange(margin + 1.0))
    assert result.diff().max() < 1e-12
    assert result.diff().abs().max() < margin * math.pi / 4000 * 1.001
    single = psi(theta.float().cos(), margin)
    torch.testing.assert_close(single.double(), result, rtol=0, atol=2e-6 * margin**2)


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_psi_gradient(margin: int) -> None:
    cosine = torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_()
    inside = cosine.detach()[1:-1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: psi(x, margin), inside)
    (slope,) = torch.autograd.grad(psi(cosine, margin).sum(), cosine)
    assert slope[0].item() == pytest.approx(margin**2)
    assert slope[-1].item() == pytest.approx(margin**2)


@pytest.mark.parametrize("loss", ZERO_MARGIN, ids=repr)
def test_without_a_margin_it_is_cross_entropy_of_the_evaluated_logits(loss: MarginLoss) -> None:
    """The argmax of the head's logits is therefore the decision that is trained."""
    embedding, weight, labels = randn(32, 6), randn(10, 6, seed=1), torch.arange(32) % 10
    outputs = outputs_of(loss, embedding, weight, bias=0.3)
    length = embedding.norm(dim=1, keepdim=True)
    match loss:
        case LargeMarginSoftmax():
            logits = outputs.logits
        case SphereFace(scale=None):
            logits = length * outputs.logits
        case ArcFace(scale=scale) | CosFace(scale=scale) | SphereFace(scale=scale):
            logits = (scale or 1) * outputs.logits
    assert torch.equal(logits.argmax(1), outputs.logits.argmax(1))
    result = loss(outputs, labels)
    torch.testing.assert_close(result, F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_loss_increases_with_the_angle(loss: MarginLoss) -> None:
    theta = torch.linspace(0, math.pi, 3001, dtype=torch.float64)
    result = loss(at_angles(loss, theta), zeros(3001)).double()
    assert result.diff().min() > -3e-6  # float32
    assert result[-1] > result[0] + 1


@pytest.mark.parametrize("loss", [ArcFace(), CosFace(), SphereFace(), LargeMarginSoftmax()])
def test_loss_increases_with_the_margin(loss: Any) -> None:
    theta = torch.linspace(0.1, math.pi - 0.1, 50)
    result = []
    for step in range(1, 5):
        margin = 0.2 * step if isinstance(loss, ArcFace | CosFace) else step
        result.append(replace(loss, margin=margin)(at_angles(loss, theta), zeros(50)).double())
    assert (torch.stack(result).diff(dim=0) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_gradients_are_finite_at_angles_0_and_pi_and_for_zero_embeddings(
    loss: MarginLoss, dtype: torch.dtype
) -> None:
    """Outputs are float32 also under autocast; bfloat16 outputs must not give NaN either."""
    same = torch.tensor([[0.6, 0.8, 0.0]])
    embedding = torch.cat([same, -same, 0 * same, 30 * same, 1e-20 * same]).requires_grad_()
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(loss, embedding, weight)
        outputs = Outputs(*(part.to(dtype) for part in outputs))
        result = torch.cat([loss(outputs, torch.full((5,), label)) for label in range(3)])
    assert result.dtype == torch.float32
    gradients = torch.autograd.grad(result.sum(), (embedding, weight))
    assert all(values.isfinite().all() for values in (result, *gradients))


@pytest.mark.parametrize("loss", [m for m in MARGINS if m.head == "cosine"], ids=repr)
def test_gradient_of_the_true_cosine_is_negative_at_angles_0_and_pi(loss: MarginLoss) -> None:
    cosines = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [1 - 6e-8, 0.2]]).requires_grad_()
    result = loss(Outputs(cosines, torch.ones(3, 2), torch.eye(2)), zeros(3))
    (slope,) = torch.autograd.grad(result.sum(), cosines)
    assert (slope[:, 0] < 0).all()
    assert slope.abs().max() < 1e4


@pytest.mark.parametrize("loss", [m for m in MARGINS if m != MARGINS[1]], ids=repr)
def test_gradient_matches_finite_differences(loss: MarginLoss) -> None:
    """In float64, without straight_through, whose gradient differs on purpose."""
    embedding = randn(8, 4).double().requires_grad_()
    weight = randn(5, 4, seed=1).double().requires_grad_()
    labels = torch.arange(8) % 5

    def formula(embedding: Tensor, weight: Tensor) -> Tensor:
        outputs = outputs_of(loss, embedding, weight)
        return loss.per_sample(outputs, labels, None)

    assert torch.autograd.gradcheck(formula, (embedding, weight))


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_permuting_samples_or_classes_permutes_the_losses(loss: MarginLoss) -> None:
    embedding, weight, labels = randn(16, 6), randn(10, 6, seed=1), torch.arange(16) % 10
    outputs = outputs_of(loss, embedding, weight)
    result = loss(outputs, labels)
    rows, classes = torch.randperm(16), torch.randperm(10)
    moved = loss(outputs_of(loss, embedding[rows], weight), labels[rows])
    torch.testing.assert_close(moved, result[rows])
    renamed = outputs_of(loss, embedding, weight[classes])
    torch.testing.assert_close(loss(renamed, classes.argsort()[labels]), result)


def test_which_losses_depend_on_the_lengths_of_embeddings_and_weights() -> None:
    embedding, weight, labels = randn(16, 6), randn(10, 6, seed=1), torch.arange(16) % 10

    def result(loss: MarginLoss, by: float = 1.0, width: float = 1.0) -> Tensor:
        return loss(outputs_of(loss, by * embedding, width * weight), labels)

    for loss in (ArcFace(), CosFace(), SphereFace(scale=16)):
        torch.testing.assert_close(result(loss, 7, 3), result(loss))
    unscaled = SphereFace()
    torch.testing.assert_close(result(unscaled, 1, 3), result(unscaled))
    assert (result(unscaled, 7) - result(unscaled)).abs().min() > 0.1
    linear = LargeMarginSoftmax()
    torch.testing.assert_close(result(linear, 4, 0.25), result(linear))
    assert (result(linear, 4) - result(linear)).abs().min() > 0.1


SIZES = {"num_classes": 10, "embedding_size": 6}


@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (CosFace(scale=16, margin=0.35), CosFaceLoss(**SIZES, margin=0.35, scale=16)),
        (SphereFace(margin=4, lambda_=0), SphereFaceLoss(**SIZES, margin=4)),
        (SphereFace(margin=3, lambda_=0), SphereFaceLoss(**SIZES, margin=3)),
        (LargeMarginSoftmax(margin=2, lambda_=0), LargeMarginSoftmaxLoss(**SIZES, margin=2)),
        (LargeMarginSoftmax(margin=4, lambda_=0), LargeMarginSoftmaxLoss(**SIZES, margin=4)),
    ],
    ids=["cosface", "sphereface 4", "sphereface 3", "l_softmax 2", "l_softmax 4"],
)
def test_values_and_gradients_match_pytorch_metric_learning(loss: MarginLoss, oracle: Any) -> None:
    """Its weights are columns, it has no bias and no lambda, and it returns the batch mean."""
    labels = torch.arange(64) % 10
    embedding, oracle_embedding = (randn(64, 6).requires_grad_() for _ in range(2))
    weight = oracle.W.detach().T.clone().requires_grad_()
    result = loss(outputs_of(loss, embedding, weight), labels).mean()
    expected = oracle(oracle_embedding, labels)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result, (embedding, weight))
    oracle_gradients = torch.autograd.grad(expected, (oracle_embedding, oracle.W))
    torch.testing.assert_close(gradients[0], oracle_gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], oracle_gradients[1].T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_every_parameter_of_the_head_gets_a_gradient(loss: MarginLoss) -> None:
    """DDP waits for every parameter's gradient, and an untrained bias would change the argmax."""
    head = LinearHead(6, 10) if loss.head == "linear" else CosineHead(6, 10, embedding_size=8)
    loss(head(randn(32, 6)), torch.arange(32) % 10).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        if name != "norm.bias":
            assert parameter.grad.abs().max() > 1e-3, name
