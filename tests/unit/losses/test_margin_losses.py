"""Margins in angles: numbers by hand, other people's code, and what must hold at every angle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import CosFaceLoss, LargeMarginSoftmaxLoss, SphereFaceLoss
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.classification import ArcFace, CosFace, LargeMarginSoftmax, SphereFace
from cifar_dist.losses.margin import psi
from cifar_dist.models.heads import CosineHead, LinearHead, Outputs

Margin = ArcFace | CosFace | SphereFace | LargeMarginSoftmax
MARGINS: list[Margin] = [
    ArcFace(),
    ArcFace(straight_through=True),
    CosFace(),
    SphereFace(),
    SphereFace(margin=3, lambda_=0),
    SphereFace(margin=2, lambda_=1, scale=16),
    LargeMarginSoftmax(),
    LargeMarginSoftmax(margin=4, lambda_=0),
]
WITHOUT: list[Margin] = [
    ArcFace(margin=0),
    CosFace(margin=0),
    SphereFace(margin=1, lambda_=0),
    SphereFace(margin=1, scale=16),
    LargeMarginSoftmax(margin=1),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs_of(loss: Margin, embedding: Tensor, weight: Tensor, bias: float = 0.0) -> Outputs:
    """What the head that the loss needs would give: embedding [B, D] and weights [C, D]."""
    if loss.head == "linear":
        return Outputs(embedding @ weight.T + bias, embedding, weight)
    class_weight = F.normalize(weight)
    return Outputs(F.normalize(embedding) @ class_weight.T, embedding, class_weight)


def at_angles(loss: Margin, theta: Tensor, *, length: float = 2.0, width: float = 1.0) -> Outputs:
    """Embeddings at angles `theta` to the weight of class 0, at a right angle to that of class 1."""
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
def test_by_hand_at_60_degrees(loss: Margin, true_logit: float) -> None:
    found = loss(at_angles(loss, SIXTY, width=3), zeros(1))
    assert found.item() == pytest.approx(math.log1p(math.exp(-true_logit)), abs=1e-5)


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
def test_psi_is_the_papers_formula_and_falls_without_a_step(margin: int) -> None:
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    found = psi(theta.cos(), margin)
    folds = (theta * margin / math.pi).floor().clamp(max=margin - 1)
    torch.testing.assert_close(found, (-1) ** folds * (margin * theta).cos() - 2 * folds)
    corners = torch.arange(margin + 1) * math.pi / margin
    torch.testing.assert_close(psi(corners.cos(), margin), 1 - 2 * torch.arange(margin + 1.0))
    assert found.diff().max() < 1e-12
    assert found.diff().abs().max() < margin * math.pi / 4000 * 1.001
    single = psi(theta.float().cos(), margin)
    torch.testing.assert_close(single.double(), found, rtol=0, atol=2e-6 * margin**2)


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_slope_of_psi(margin: int) -> None:
    cosine = torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_()
    inside = cosine.detach()[1:-1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: psi(x, margin), inside)
    (slope,) = torch.autograd.grad(psi(cosine, margin).sum(), cosine)
    assert slope[0].item() == pytest.approx(margin**2)
    assert slope[-1].item() == pytest.approx(margin**2)


@pytest.mark.parametrize("loss", WITHOUT, ids=repr)
def test_without_a_margin_it_is_cross_entropy_of_what_an_evaluation_sees(loss: Margin) -> None:
    """Hence the argmax of the head's logits is the decision that the margin was trained for."""
    embedding, weight, labels = numbers(32, 6), numbers(10, 6, seed=1), torch.arange(32) % 10
    outputs = outputs_of(loss, embedding, weight, bias=0.3)
    length = embedding.norm(dim=1, keepdim=True)
    match loss:
        case LargeMarginSoftmax():
            seen = outputs.logits
        case SphereFace(scale=None):
            seen = length * outputs.logits
        case ArcFace(scale=scale) | CosFace(scale=scale) | SphereFace(scale=scale):
            seen = (scale or 1) * outputs.logits
    assert torch.equal(seen.argmax(1), outputs.logits.argmax(1))
    found = loss(outputs, labels)
    torch.testing.assert_close(found, F.cross_entropy(seen, labels, reduction="none"))


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_the_loss_grows_with_the_angle(loss: Margin) -> None:
    theta = torch.linspace(0, math.pi, 3001, dtype=torch.float64)
    found = loss(at_angles(loss, theta), zeros(3001)).double()
    assert found.diff().min() > -3e-6  # float32
    assert found[-1] > found[0] + 1


@pytest.mark.parametrize("loss", [ArcFace(), CosFace(), SphereFace(), LargeMarginSoftmax()])
def test_the_loss_grows_with_the_margin(loss: Margin) -> None:
    theta = torch.linspace(0.1, math.pi - 0.1, 50)
    found = []
    for step in range(1, 5):
        margin = 0.2 * step if isinstance(loss, ArcFace | CosFace) else step
        found.append(replace(loss, margin=margin)(at_angles(loss, theta), zeros(50)).double())  # type: ignore[arg-type]
    assert (torch.stack(found).diff(dim=0) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_gradients_are_finite_at_the_ends_and_for_no_embedding(
    loss: Margin, dtype: torch.dtype
) -> None:
    """Under autocast the head's outputs are float32 already; in bfloat16 they must do no harm."""
    same = torch.tensor([[0.6, 0.8, 0.0]])
    embedding = torch.cat([same, -same, 0 * same, 30 * same, 1e-20 * same]).requires_grad_()
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(loss, embedding, weight)
        outputs = Outputs(*(part.to(dtype) for part in outputs))
        found = torch.cat([loss(outputs, torch.full((5,), label)) for label in range(3)])
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found.sum(), (embedding, weight))
    assert all(values.isfinite().all() for values in (found, *gradients))


@pytest.mark.parametrize("loss", [m for m in MARGINS if m.head == "cosine"], ids=repr)
def test_the_true_class_is_always_pulled_at_the_ends(loss: Margin) -> None:
    """At the angles 0 and pi the true cosine still has a slope, downwards and not huge."""
    cosines = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [1 - 6e-8, 0.2]]).requires_grad_()
    found = loss(Outputs(cosines, torch.ones(3, 2), torch.eye(2)), zeros(3))
    (slope,) = torch.autograd.grad(found.sum(), cosines)
    assert (slope[:, 0] < 0).all()
    assert slope.abs().max() < 1e4


@pytest.mark.parametrize("loss", [m for m in MARGINS if m != MARGINS[1]], ids=repr)
def test_the_gradient_is_that_of_the_formula(loss: Margin) -> None:
    """In float64; straight_through is left out, whose gradient is another by intention."""
    embedding = numbers(8, 4).double().requires_grad_()
    weight = numbers(5, 4, seed=1).double().requires_grad_()
    labels = torch.arange(8) % 5

    def formula(embedding: Tensor, weight: Tensor) -> Tensor:
        outputs = outputs_of(loss, embedding, weight)
        match loss:
            case LargeMarginSoftmax():
                logits = loss.logits(outputs, labels)
            case SphereFace():
                logits = loss.logits(outputs.logits, outputs.embedding, labels)
            case ArcFace() | CosFace():
                logits = loss.logits(outputs.logits, labels)
        return F.cross_entropy(logits, labels, reduction="none")

    assert torch.autograd.gradcheck(formula, (embedding, weight))


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_the_order_of_samples_and_classes_does_not_matter(loss: Margin) -> None:
    embedding, weight, labels = numbers(16, 6), numbers(10, 6, seed=1), torch.arange(16) % 10
    outputs = outputs_of(loss, embedding, weight)
    found = loss(outputs, labels)
    rows, classes = torch.randperm(16), torch.randperm(10)
    moved = loss(outputs_of(loss, embedding[rows], weight), labels[rows])
    torch.testing.assert_close(moved, found[rows])
    renamed = outputs_of(loss, embedding, weight[classes])
    torch.testing.assert_close(loss(renamed, classes.argsort()[labels]), found)


def test_what_lengths_do() -> None:
    embedding, weight, labels = numbers(16, 6), numbers(10, 6, seed=1), torch.arange(16) % 10

    def found(loss: Margin, by: float = 1.0, width: float = 1.0) -> Tensor:
        return loss(outputs_of(loss, by * embedding, width * weight), labels)

    for loss in (ArcFace(), CosFace(), SphereFace(scale=16)):
        torch.testing.assert_close(found(loss, 7, 3), found(loss))
    unscaled = SphereFace()
    torch.testing.assert_close(found(unscaled, 1, 3), found(unscaled))
    assert (found(unscaled, 7) - found(unscaled)).abs().min() > 0.1
    linear = LargeMarginSoftmax()
    torch.testing.assert_close(found(linear, 4, 0.25), found(linear))
    assert (found(linear, 4) - found(linear)).abs().min() > 0.1


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
def test_pytorch_metric_learning_has_the_same_values_and_gradients(
    loss: Margin, oracle: Any
) -> None:
    """Its weights lie as columns, it has no bias and no lambda, and it gives the mean of the batch."""
    labels = torch.arange(64) % 10
    found_at, wanted_at = (numbers(64, 6).requires_grad_() for _ in range(2))
    weight = oracle.W.detach().T.clone().requires_grad_()
    found = loss(outputs_of(loss, found_at, weight), labels).mean()
    wanted = oracle(wanted_at, labels)
    torch.testing.assert_close(found, wanted)
    of_found = torch.autograd.grad(found, (found_at, weight))
    of_wanted = torch.autograd.grad(wanted, (wanted_at, oracle.W))
    torch.testing.assert_close(of_found[0], of_wanted[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_found[1], of_wanted[1].T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", MARGINS, ids=repr)
def test_each_teaches_all_of_the_head_that_it_names(loss: Margin) -> None:
    """DDP waits for every parameter's gradient, and an untaught bias would move the argmax."""
    head = LinearHead(6, 10) if loss.head == "linear" else CosineHead(6, 10, embedding_size=8)
    loss(head(numbers(32, 6)), torch.arange(32) % 10).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        if name != "norm.bias":
            assert parameter.grad.abs().max() > 1e-3, name
