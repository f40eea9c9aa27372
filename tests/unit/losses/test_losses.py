"""Losses against hand-computed values and other implementations, and properties of all losses."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from outputs import outputs_of
from pytorch_metric_learning.losses import ArcFaceLoss
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy as TimmsBinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig, AugmentedBatch
from cifar_dist.data.dataset import Split
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import BinaryCrossEntropy, CrossEntropy, balanced_weights
from cifar_dist.losses.margin import ArcFace, CosFace, SphereFace
from cifar_dist.losses.metric import SupCon
from cifar_dist.losses.registry import LOSSES, logit_scale
from cifar_dist.models.heads import Outputs
from cifar_dist.training.objective import LossInputs, Objective

WITHOUT_TEACHER = [make() for make in LOSSES.values() if not make.needs_teacher]


def two_class_loss(loss: ArcFace, theta: Tensor) -> Tensor:
    """Return the loss of samples of class 0, at angle `theta` to class 0 and 90 degrees to class 1."""
    cosines = torch.stack([theta.cos(), torch.zeros_like(theta)], 1)
    return loss(outputs_of(cosines), torch.zeros(len(theta), dtype=torch.int64))


def true_logit(loss: ArcFace, theta: Tensor) -> Tensor:
    """Solve the loss for the logit z of the true class: l = -log(e^z / (e^z + 1))."""
    return -torch.log(torch.expm1(two_class_loss(loss, theta).double()))


def test_cross_entropy_hand_computed():
    outputs = outputs_of(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    labels = torch.tensor([0, 1])
    plain = CrossEntropy()(outputs, labels)
    torch.testing.assert_close(plain, torch.tensor([math.log(4 / 3), math.log(2)]))
    # Smoothing 0.2 gives the classes 0.9 and 0.1: 0.9 log(4/3) + 0.1 log 4.
    smooth = CrossEntropy(label_smoothing=0.2)(outputs, labels)
    assert smooth[0].item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_cross_entropy_matches_torch_and_ignores_its_weight():
    logits, labels = torch.randn(16, 10), torch.randint(0, 10, (16,))
    result = CrossEntropy(weight=3, label_smoothing=0.1)(outputs_of(logits), labels)
    assert torch.equal(
        result, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    )


def test_balanced_weights_match_scikit_learn_and_have_mean_1():
    labels = torch.arange(6).repeat_interleave(torch.tensor([500, 3, 40, 1, 77, 9]))
    weights = balanced_weights(labels, 6)
    oracle = compute_class_weight("balanced", classes=torch.arange(6).numpy(), y=labels.numpy())
    torch.testing.assert_close(weights, torch.from_numpy(oracle).float())
    assert weights[labels].mean().item() == pytest.approx(1)
    empty = balanced_weights(labels, 8)  # classes without rows do not change the others
    assert torch.equal(empty, torch.cat([weights, torch.zeros(2)]))
    assert torch.equal(balanced_weights(torch.arange(5).repeat(7), 5), torch.ones(5))


def test_balanced_cross_entropy_is_that_of_torch_with_weights():
    """Other losses have no weights; a mixed image has the weighted loss of both labels."""
    logits, labels, partners = torch.randn(16, 10), torch.arange(16) % 10, torch.arange(16) % 7
    weights, lam = balanced_weights(torch.arange(55) % 10, 10), torch.rand(16)
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    losses: dict[str, Loss] = {"cross_entropy": CrossEntropy(class_weights="balanced")}
    losses["bce"] = BinaryCrossEntropy()
    objective = Objective(
        Augment(AugmentConfig(), Split(images=images, labels=labels)), losses, class_weights=weights
    )
    mixed = AugmentedBatch(
        images=images, labels=labels, view_ids=labels, partner_labels=partners, lam=lam
    )
    inputs = LossInputs(mixed, None, 0)
    terms = objective.compute_losses(lambda _: outputs_of(logits), inputs)
    expected = [
        F.cross_entropy(logits, of, weight=weights, reduction="none") for of in (labels, partners)
    ]
    torch.testing.assert_close(terms["cross_entropy"], lam * expected[0] + (1 - lam) * expected[1])
    bce = [BinaryCrossEntropy()(outputs_of(logits), of) for of in (labels, partners)]
    torch.testing.assert_close(terms["bce"], lam * bce[0] + (1 - lam) * bce[1])


def test_bce_hand_computed():
    outputs = outputs_of(torch.tensor([[math.log(3.0), 0.0, -math.log(3.0)]]))  # 3/4, 1/2, 1/4
    result = BinaryCrossEntropy()(outputs, torch.tensor([0]))
    assert result.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2) - math.log(3 / 4))
    # Smoothing 0.3 of three classes: 0.8, 0.1, 0.1.
    smooth = BinaryCrossEntropy(label_smoothing=0.3)(outputs, torch.tensor([0]))
    expected = -0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4) - math.log(1 / 2)
    assert smooth.item() == pytest.approx(expected - math.log(3 / 4) + 0.1 * math.log(3))


def test_bce_gradient_is_probability_minus_target():
    logits, labels = torch.randn(16, 10).requires_grad_(), torch.randint(0, 10, (16,))
    (slope,) = torch.autograd.grad(BinaryCrossEntropy()(outputs_of(logits), labels).sum(), logits)
    torch.testing.assert_close(slope, (logits.sigmoid() - F.one_hot(labels, 10)).detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_matches_timm(smoothing):
    logits, labels = torch.randn(16, 10), torch.randint(0, 10, (16,))
    result = BinaryCrossEntropy(label_smoothing=smoothing)(outputs_of(logits), labels)
    oracle = TimmsBinaryCrossEntropy(smoothing=smoothing, reduction="none", sum_classes=False)
    torch.testing.assert_close(result, oracle(logits, labels).sum(1))


@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1), BinaryCrossEntropy()])
def test_weighted_losses_of_two_labels_are_the_loss_of_the_mixed_target(loss):
    logits, labels, partners = torch.randn(16, 10), torch.arange(16) % 10, torch.arange(16) % 7
    lam = torch.rand(16)
    result = lam * loss(outputs_of(logits), labels)
    result = result + (1 - lam) * loss(outputs_of(logits), partners)
    one, other = F.one_hot(labels, 10), F.one_hot(partners, 10)
    mixed = lam[:, None] * one + (1 - lam[:, None]) * other
    if isinstance(loss, CrossEntropy):
        expected = F.cross_entropy(logits, mixed, label_smoothing=0.1, reduction="none")
    else:
        expected = F.binary_cross_entropy_with_logits(logits, mixed, reduction="none").sum(1)
    torch.testing.assert_close(result, expected)


def test_arcface_hand_computed():
    # The true class at 60 degrees, the other at 90: e^(2 cos(60 + 30 degrees)) = 1 against 1.
    loss = ArcFace(scale=2, margin=math.pi / 6)
    result = two_class_loss(loss, torch.tensor([math.pi / 3]))
    assert result.item() == pytest.approx(math.log(2), abs=1e-6)


def test_arcface_matches_pytorch_metric_learning():
    oracle = ArcFaceLoss(num_classes=10, embedding_size=6, margin=math.degrees(0.35), scale=8)
    embedding, labels = torch.randn(64, 6), torch.randint(0, 10, (64,))
    cosines = F.normalize(embedding) @ F.normalize(oracle.W.detach(), dim=0)
    # Beyond pi - margin its line has a step, which ArcFace here does not have.
    before_the_line = cosines[torch.arange(64), labels] > -math.cos(0.35)
    embedding, labels, cosines = (x[before_the_line] for x in (embedding, labels, cosines))
    assert len(labels) > 50
    loss = ArcFace(scale=8, margin=0.35)(outputs_of(cosines), labels)
    torch.testing.assert_close(loss.mean(), oracle(embedding, labels).detach())


def test_arcface_with_margin_zero_is_scaled_cross_entropy():
    cosines, labels = torch.rand(32, 10) * 2 - 1, torch.randint(0, 10, (32,))
    result = ArcFace(scale=16, margin=0)(outputs_of(cosines), labels)
    torch.testing.assert_close(result, F.cross_entropy(16 * cosines, labels, reduction="none"))


@pytest.mark.parametrize("margin", [0.1, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("straight_through", [False, True])
def test_arcface_logit_decreases_continuously_with_the_angle(margin, straight_through):
    loss = ArcFace(scale=1, margin=margin, straight_through=straight_through)
    theta = torch.linspace(0, math.pi, 3001)
    logit = true_logit(loss, theta)
    steps = logit.diff()
    assert steps.max() < 2e-6  # float32 at the flat ends
    assert steps.abs().max() < 2.1e-3  # 3000 steps of pi / 3000 with a slope of at most 1, twice
    before = theta < math.pi - margin
    line = theta.cos() + math.cos(margin) - 1
    expected = torch.where(before, (theta + margin).cos(), line).double()
    torch.testing.assert_close(logit, expected, rtol=0, atol=3e-4)  # the sine is at least 3e-4


def test_arcface_gradient_matches_finite_differences():
    cosines = torch.rand(64, 10, generator=torch.Generator().manual_seed(0)) * 1.96 - 0.98
    labels = torch.arange(64) % 10
    loss, scale, margin = ArcFace(), 8.0, 0.35
    cosines.requires_grad_()
    (result,) = torch.autograd.grad(loss(outputs_of(cosines), labels).sum(), cosines)

    def formula(values: Tensor) -> Tensor:  # float64, written with acos
        true = values.gather(1, labels[:, None])
        theta = true.acos()
        line = true + math.cos(margin) - 1
        moved = torch.where(theta < math.pi - margin, (theta + margin).cos(), line)
        logits = scale * values.scatter(1, labels[:, None], moved)
        return F.cross_entropy(logits, labels, reduction="none")

    step = 1e-6
    exact = cosines.detach().double()
    for column in range(10):
        nudge = torch.zeros_like(exact)
        nudge[:, column] = step
        slope = (formula(exact + nudge) - formula(exact - nudge)) / (2 * step)
        torch.testing.assert_close(result[:, column].double(), slope, rtol=1e-3, atol=1e-4)


def test_arcface_is_finite_at_cosines_of_one_and_slightly_above():
    edge = torch.tensor([1.0, -1.0, 1 + 2e-7, -1 - 2e-7, 1 - 6e-8, 0.0])
    for straight_through in (False, True):
        cosines = torch.stack([edge, torch.zeros(6)], 1).requires_grad_()
        loss = ArcFace(straight_through=straight_through)
        result = loss(outputs_of(cosines), torch.zeros(6, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(result.sum(), cosines)
        assert result.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient[:, 0] < 0).all()  # always pulled towards its class


def tutorial_arcface(logits: Tensor, labels: Tensor, *, scale: float, margin: float) -> Tensor:
    """Return ArcFace logits edited under no_grad, as in the tutorial: autograd sees no margin."""
    logits = logits * 1.0
    index = torch.arange(len(labels))
    with torch.no_grad():
        target = logits[index, labels].arccos()
        logits.arccos_()
        logits[index, labels] = target + margin
        logits.cos_()
    return logits * scale


def test_straight_through_matches_editing_under_no_grad():
    cosines = torch.rand(32, 10) * 1.8 - 0.9
    labels = torch.randint(0, 10, (32,))
    found_at, wanted_at = (cosines.clone().requires_grad_() for _ in range(2))
    result = ArcFace(straight_through=True)(outputs_of(found_at), labels)
    edited = tutorial_arcface(wanted_at, labels, scale=8, margin=0.35)
    expected = F.cross_entropy(edited, labels, reduction="none")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    (found_gradient,) = torch.autograd.grad(result.sum(), found_at)
    (wanted_gradient,) = torch.autograd.grad(expected.sum(), wanted_at)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-4, atol=1e-5)

    true_at = cosines.clone().requires_grad_()
    true = ArcFace()(outputs_of(true_at), labels)
    torch.testing.assert_close(true, result)
    (true_gradient,) = torch.autograd.grad(true.sum(), true_at)
    rows = torch.arange(32)
    ratio = true_gradient[rows, labels] / found_gradient[rows, labels]
    theta = cosines[rows, labels].acos()
    torch.testing.assert_close(ratio, (theta + 0.35).sin() / theta.sin(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", WITHOUT_TEACHER, ids=repr)
def test_autocast_does_not_change_a_bit(loss):
    outputs = Outputs(torch.rand(8, 5) * 2 - 1, torch.randn(8, 6), torch.randn(5, 6))
    labels = torch.randint(0, 5, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(outputs, labels)
    assert result.dtype == torch.float32
    assert result.shape == (8,)
    assert torch.equal(result, loss(outputs, labels))


@pytest.mark.parametrize("loss", WITHOUT_TEACHER, ids=repr)
def test_outputs_are_not_modified_in_place(loss):
    outputs = Outputs(torch.rand(8, 5), torch.randn(8, 6), torch.randn(5, 6))
    before = [part.clone() for part in outputs]
    loss(outputs, torch.zeros(8, dtype=torch.int64))
    assert all(torch.equal(one, other) for one, other in zip(outputs, before, strict=True))


def test_heads_classifier_training_and_mixup_of_each_loss():
    assert {name for name, kind in LOSSES.items() if kind.head == "cosine"} == {
        "arcface",
        "cosface",
        "sphereface",
        "margin_distill",
    }
    assert {name for name, kind in LOSSES.items() if kind.head == "linear"} == {"l_softmax"}
    metric = {"triplet", "contrastive", "supcon"}
    assert {name for name, kind in LOSSES.items() if not kind.trains_classifier} == metric
    assert {name for name, kind in LOSSES.items() if not kind.supports_mixup} == metric | {
        "margin_distill"
    }
    assert all(make().weight == 1 for make in LOSSES.values())


def test_documentation_lists_each_loss_with_its_head_and_options():
    folder = Path(__file__).parents[3] / "docs"
    lines = [
        line
        for page in ("losses.md", "distillation.md")
        for line in (folder / page).read_text().splitlines()
    ]
    for name, kind in LOSSES.items():
        assert is_dataclass(kind)
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        options = {field.name for field in fields(kind)} - {"weight"}
        assert kind.needs_teacher or all(f"`{option}` (" in row for option in options), name
        assert kind.needs_teacher or f"| {kind.head or 'any'} |" in row, name


def test_logit_scale_is_the_largest_scale_of_the_losses():
    assert logit_scale([]) == 1
    assert logit_scale([CrossEntropy()]) == 1
    assert logit_scale([CrossEntropy(), ArcFace(scale=8), ArcFace(scale=64)]) == 64
    assert logit_scale([ArcFace(scale=0.5)]) == 0.5
    assert logit_scale([SphereFace()]) == 1
    assert logit_scale([SphereFace(), CosFace(scale=12), SupCon(temperature=50)]) == 12
    assert logit_scale([SphereFace(scale=30), CosFace(scale=12)]) == 30
