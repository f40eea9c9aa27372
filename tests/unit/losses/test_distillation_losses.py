"""Distillation losses against hand-computed values, the papers' formulas, and their invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from outputs import outputs_of
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig, AugmentedBatch
from cifar_dist.data.batches import Batch, gather_batch
from cifar_dist.data.dataset import Split
from cifar_dist.distill.teacher import TeacherEnsemble
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.distillation import (
    DecoupledDistill,
    Dist,
    Distill,
    DistillationLoss,
    LogitMse,
    MarginDistill,
    MultiLevel,
    TransformedTeacher,
)
from cifar_dist.losses.margin import ArcFace
from cifar_dist.losses.registry import LOSSES
from cifar_dist.models.heads import Outputs
from cifar_dist.training.objective import Objective

DISTILLATION: list[Loss] = [
    Distill(),
    Distill(temperature=1, standardize=True),
    DecoupledDistill(),
    Dist(),
    DecoupledDistill(temperature=1, standardize=True),
    TransformedTeacher(gamma=1.0),
    MultiLevel(),
    LogitMse(),
    MarginDistill(),
]
LOG3 = math.log(3)


def randn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(student)) % student.shape[1] if labels is None else labels
    return loss(outputs_of(student), labels, teacher)


def test_distill_hand_computed():
    # T = 2 turns log 9 into log 3: teacher (3/4, 1/4), student (1/2, 1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * LOG3, 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert apply(Distill(temperature=2), student, teacher).item() == pytest.approx(expected)


def test_margin_distill_hand_computed():
    """At scale 8 and T = 4, a true cosine of 0 becomes -2 sin(margin), one of 1 becomes 2 cos(margin).

    Within 1e-3, as ArcFace's sine of angle 0 is 3e-4.
    """
    flat, confident = torch.zeros(1, 2), torch.tensor([[8.0, 0.0]])
    loss, label = MarginDistill(margin=0.35), torch.zeros(1, dtype=torch.int64)
    assert apply(loss, flat, flat, label).item() == pytest.approx(0, abs=1e-6)
    teacher = 1 / (1 + math.exp(-2 * math.cos(0.35)))
    student = 1 / (1 + math.exp(2 * math.sin(0.35)))
    expected = teacher * math.log(teacher / student)
    expected += (1 - teacher) * math.log((1 - teacher) / (1 - student))
    assert apply(loss, flat, confident, label).item() == pytest.approx(16 * expected, rel=1e-3)


def test_margin_distill_is_distill_of_arcface_logits():
    """By default its gradient is straight-through."""
    cosines, teacher_logits = (
        randn(6, 10, scale=0.3).requires_grad_(),
        randn(6, 10, seed=1, scale=0.3),
    )
    labels = torch.arange(6)
    for straight_through in (True, False):
        arcface = ArcFace(scale=8, margin=0.35, straight_through=straight_through)
        expected = apply(
            Distill(),
            arcface.add_margin(cosines, labels),
            arcface.add_margin(teacher_logits, labels),
        )
        result = apply(
            MarginDistill(straight_through=straight_through), 8 * cosines, 8 * teacher_logits
        )
        torch.testing.assert_close(result, expected)
        (slope,) = torch.autograd.grad(result.sum(), cosines)
        (oracle,) = torch.autograd.grad(expected.sum(), cosines)
        torch.testing.assert_close(slope, oracle)
    assert (apply(MarginDistill(), 8 * cosines, 8 * teacher_logits) != result).sum() == 0
    assert not torch.allclose(apply(Distill(), 8 * cosines, 8 * teacher_logits), result)


def test_distill_matches_torchs_kl_div_and_the_published_gradient():
    student, teacher = randn(6, 10).requires_grad_(), randn(6, 10, seed=1)
    temperature = 4.0
    result = apply(Distill(temperature=temperature), student, teacher)
    logs, expected = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    oracle = temperature**2 * F.kl_div(logs, expected, reduction="none").sum(1)
    torch.testing.assert_close(result, oracle)
    (gradient,) = torch.autograd.grad(result.sum(), student)
    # Hinton et al., eq. 2, times T^2: T * (student's softmax - teacher's).
    torch.testing.assert_close(gradient, temperature * (logs.exp() - expected).detach())


def test_dist_at_temperature_t_is_t_squared_times_dist_of_divided_logits():
    student, teacher = randn(6, 10), randn(6, 10, seed=1)
    divided = apply(Dist(temperature=1), student / 4, teacher / 4)
    torch.testing.assert_close(apply(Dist(temperature=4), student, teacher), 16 * divided)


def test_standardized_distill_hand_computed():
    # (4, 0) and (0, 10) become (1, -1) and (-1, 1): softmax with T = 2 / log 3 gives 3 : 1.
    student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 10.0]])
    loss = Distill(temperature=2 / LOG3, standardize=True)
    expected = (2 / LOG3) ** 2 * (0.75 * LOG3 - 0.25 * LOG3)
    assert apply(loss, student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_standardized_distill_ignores_scale_and_offset():
    student, teacher, loss = randn(6, 10), randn(6, 10, seed=1), Distill(standardize=True)
    plain = apply(loss, student, teacher)
    torch.testing.assert_close(apply(loss, 0.1 * student + 3, 50 * teacher - 7), plain)


def test_dkd_hand_computed():
    # T = 1, true class 0. Teacher: 1/2 true, the others 3/8 and 1/8. Student: all 1/3.
    teacher = torch.tensor([[math.log(4), LOG3, 0.0]])
    target = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 3 / 2)
    others = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    loss = DecoupledDistill(temperature=1, alpha=2, beta=5)
    result = apply(loss, torch.zeros(1, 3), teacher, torch.tensor([0]))
    assert result.item() == pytest.approx(2 * target + 5 * others)


def test_dkd_with_beta_of_the_teachers_other_classes_is_distill():
    """Zhao et al. 2022: KL = target + (1 - p) * others, p the teacher's probability of the true class."""
    student, teacher = randn(1, 10), randn(1, 10, seed=1)
    label = torch.tensor([4])
    beta = 1 - (teacher / 4).softmax(1)[0, 4].item()
    result = apply(DecoupledDistill(temperature=4, beta=beta), student, teacher, label)
    torch.testing.assert_close(result, apply(Distill(temperature=4), student, teacher))


def kd_as_published(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the sum over the classes of p_t log(p_t / p_s), Hinton et al. 2015."""
    expected, result = (logits.div(temperature).softmax(1) for logits in (teacher, student))
    return temperature**2 * (expected * (expected / result).log()).sum(1)


def dkd_as_published(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """Return DKD as in the code of Zhao et al. 2022.

    Two masked sums of the probabilities, and a softmax with the true class's logit lowered by 1000.
    """
    is_true = F.one_hot(labels, student.shape[1]).to(student.dtype)

    def two_way(logits: Tensor) -> Tensor:
        probabilities = (logits / temperature).softmax(1)
        return torch.stack([(probabilities * mask).sum(1) for mask in (is_true, 1 - is_true)], 1)

    def among_others(logits: Tensor) -> Tensor:
        return (logits / temperature - 1000 * is_true).log_softmax(1)

    expected, result = two_way(teacher), two_way(student)
    target = (expected * (expected.log() - result.log())).sum(1)
    expected, result = among_others(teacher), among_others(student)
    others = (expected.exp() * (expected - result)).sum(1)
    return temperature**2 * (alpha * target + beta * others)


@pytest.mark.parametrize("scale", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("kind", ["distill", "dkd"])
def test_values_and_gradients_match_the_published_formulas_in_float64(kind: str, scale: float):
    """With both papers' settings for CIFAR-100: T = 4, alpha = 1, beta = 8."""
    student, teacher = randn(64, 100, scale=scale), randn(64, 100, seed=1, scale=scale)
    labels = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(2))
    loss: Loss = DecoupledDistill() if kind == "dkd" else Distill()
    student.requires_grad_()
    result = apply(loss, student, teacher, labels)
    precise = student.detach().double().requires_grad_()
    if kind == "dkd":
        expected = dkd_as_published(
            precise, teacher.double(), labels, temperature=4, alpha=1, beta=8
        )
    else:
        expected = kd_as_published(precise, teacher.double(), 4)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.arange(1.0, 65.0)  # so that samples cannot be confused
    (gradient,) = torch.autograd.grad((weights * result).sum(), student)
    (oracle,) = torch.autograd.grad((weights * expected).sum(), precise)
    torch.testing.assert_close(gradient.double(), oracle, rtol=1e-4, atol=1e-4)
    assert oracle.abs().max() > 1


def ttm_as_published(student: Tensor, teacher: Tensor, gamma: float, *, weighted: bool) -> Tensor:
    """Return KL(p^gamma / U || q) for TTM, times U, the sum of p^gamma, for WTTM (Zheng and Yang 2024)."""
    power = teacher.softmax(1).pow(gamma)
    total = power.sum(1)
    target, result = power / total[:, None], student.softmax(1)
    divergence = (target * (target / result).log()).sum(1)
    return total * divergence if weighted else divergence


def mlkd_as_published(student: Tensor, teacher: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Return the mean over the batch of Jin et al. 2023, eq. 2, 6 and 9, summed over the temperatures."""
    rows, classes = student.shape
    total = student.new_zeros(())
    for temperature in temperatures:
        p, q = ((logits / temperature).softmax(1) for logits in (student, teacher))
        total = total + temperature**2 * (q * (q / p).log()).sum() / rows
        for equation, divisor in (("ic,jc->ij", rows), ("ic,id->cd", classes)):
            grams = [torch.einsum(equation, x, x) for x in (q, p)]
            total = total + (grams[0] - grams[1]).pow(2).sum() / divisor
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_transformed_teacher_matches_the_published_formula(gamma: float, weighted: bool):
    student, teacher = (randn(16, 100, seed=seed).double() for seed in (0, 1))
    student.requires_grad_()
    loss = TransformedTeacher(gamma=gamma, weighted=weighted)
    result = loss.compare(student, teacher, torch.zeros(16))
    expected = ttm_as_published(student, teacher, gamma, weighted=weighted)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1.0, 17.0)
    (gradient,) = torch.autograd.grad((weights * result).sum(), student, retain_graph=True)
    (oracle,) = torch.autograd.grad((weights * expected).sum(), student)
    torch.testing.assert_close(gradient, oracle, rtol=1e-10, atol=1e-10)


def test_transformed_teacher_at_gamma_1_is_distill_at_temperature_1():
    student, teacher = randn(6, 10), randn(6, 10, seed=1)
    expected = apply(Distill(temperature=1), student, teacher)
    for weighted in (False, True):
        result = apply(TransformedTeacher(gamma=1.0, weighted=weighted), student, teacher)
        torch.testing.assert_close(result, expected)


def test_multi_level_matches_the_published_formula():
    student, teacher = (randn(16, 100, seed=seed).double() for seed in (0, 1))
    student.requires_grad_()
    loss = MultiLevel()
    result = loss.compare(student, teacher, torch.zeros(16)).mean()
    expected = mlkd_as_published(student, teacher, loss.temperatures)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(value, student, retain_graph=True)[0] for value in (result, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_multi_level_without_pairs_is_the_sum_of_distill_over_the_temperatures():
    student, teacher = randn(6, 10), randn(6, 10, seed=1)
    result = apply(MultiLevel(batch=0, classes=0, temperatures=(2.0, 4.0)), student, teacher)
    expected = sum(apply(Distill(temperature=t), student, teacher) for t in (2, 4))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "loss", [DecoupledDistill(), Dist(), TransformedTeacher(), MultiLevel()], ids=repr
)
def test_any_logit_loss_can_standardize(loss: DistillationLoss):
    """As in the code of Sun et al. 2024, up to their divisor C - 1."""
    student, teacher, labels = randn(16, 100), randn(16, 100, seed=1), torch.arange(16)
    normalized = [
        (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
        for x in (student, teacher)
    ]
    result = apply(replace(loss, standardize=True), student, teacher, labels)
    expected = apply(loss, normalized[0], normalized[1], labels)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(result, apply(loss, student, teacher, labels))


def test_margin_distill_cannot_standardize():
    with pytest.raises(ValueError, match="margin_distill needs cosines"):
        MarginDistill(standardize=True)


def test_dist_hand_computed():
    # softmax of (log 3, 0), (0, log 3), (0, 0): first class 3/4, 1/4, 1/2. Over two classes each
    # sample has correlation 1 or -1; the third, whose classes are equal, has 0.
    student = torch.tensor([[LOG3, 0.0], [0.0, LOG3], [0.0, 0.0]])
    teacher = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [0.0, LOG3]])
    # Centred over the samples: student (1, -1, 0) / 4, teacher (1, 0, -1) / 4: correlation 1/2.
    result = apply(Dist(temperature=1, inter=2, intra=3), student, teacher)
    expected = torch.tensor([0.0, 2.0, 2.0]) + 3 * 0.5
    torch.testing.assert_close(result, expected)


def test_dist_is_invariant_to_an_affine_map_of_the_probabilities():
    """Huang et al. compare relations, so p and (p + 1/C) / 2 are equal."""
    student = randn(16, 10)
    flattened = ((student.softmax(1) + 0.1) / 2).log()
    result = apply(Dist(temperature=1), student, flattened)
    torch.testing.assert_close(result, torch.zeros(16), rtol=0, atol=1e-5)


def test_dist_gives_each_sample_the_mean_of_the_intra_class_term():
    student, teacher = randn(8, 10), randn(8, 10, seed=1)
    intra = apply(Dist(inter=0), student, teacher)
    assert torch.equal(intra, intra[:1].expand(8))
    inter = apply(Dist(intra=0), student, teacher)
    torch.testing.assert_close(inter[:3], apply(Dist(intra=0), student[:3], teacher[:3]))


def test_logit_mse_hand_computed():
    result = apply(LogitMse(), torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]))
    assert result.item() == 12.5


@pytest.mark.parametrize("loss", DISTILLATION, ids=repr)
def test_equal_logits_have_no_loss_and_no_gradient(loss: Loss):
    logits = randn(16, 10).requires_grad_()
    result = apply(loss, logits, logits.detach())
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    torch.testing.assert_close(result, torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, torch.zeros(16, 10), rtol=0, atol=1e-4)
    assert (apply(loss, logits, randn(16, 10, seed=1)) > 0.01).all()


@pytest.mark.parametrize("loss", DISTILLATION, ids=repr)
def test_permuting_samples_or_classes_permutes_the_losses(loss: Loss):
    student, teacher, labels = randn(16, 10), randn(16, 10, seed=1), torch.arange(16) % 10
    result = apply(loss, student, teacher, labels)
    samples, classes = torch.randperm(16), torch.randperm(10)
    moved = apply(loss, student[samples], teacher[samples], labels[samples])
    torch.testing.assert_close(moved, result[samples])
    renamed = apply(loss, student[:, classes], teacher[:, classes], classes.argsort()[labels])
    torch.testing.assert_close(renamed, result)


@pytest.mark.parametrize(
    "loss", [loss for loss in DISTILLATION if loss not in (LogitMse(), MarginDistill())], ids=repr
)
def test_an_offset_of_all_logits_is_ignored(loss: Loss):
    student, teacher = randn(16, 10), randn(16, 10, seed=1)
    moved = apply(loss, student + 5, teacher - 3)
    torch.testing.assert_close(moved, apply(loss, student, teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", DISTILLATION, ids=repr)
def test_certain_teachers_and_students_give_finite_randn(loss: Loss):
    certain = 500 * F.one_hot(torch.arange(8) % 4, 4).float()
    student = certain.flip(0).requires_grad_()
    result = apply(loss, student, certain)
    (gradient,) = torch.autograd.grad(result.sum(), student)
    assert result.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", DISTILLATION, ids=repr)
def test_taught_losses_are_float32_with_the_same_bits_under_autocast(loss: Loss):
    student, teacher = randn(8, 5), randn(8, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        result = apply(loss, student, teacher)
    assert result.dtype == torch.float32
    assert result.shape == (8,)
    assert torch.equal(result, apply(loss, student, teacher))
    assert apply(loss, student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_every_distillation_loss_is_in_this_file():
    assert {type(loss) for loss in DISTILLATION} == {
        kind for kind in LOSSES.values() if kind.needs_teacher
    }


class ConstantTeacher:
    """Returns the same logits for every batch."""

    local_num_params = 0
    capturable = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return self.logits


def batch_of(rows: int) -> Batch:
    images = torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(rows, dtype=torch.int64)
    split = Split(images=images, labels=labels)
    return Batch(split=split, rows=torch.arange(rows), epoch=0, micro_batch=0)


def test_ensemble_is_the_weighted_mean_of_teachers():
    batch = batch_of(2)
    view = AugmentedBatch(images=batch.images, labels=batch.labels, view_ids=batch.rows)
    one, other = randn(2, 4), randn(2, 4, seed=1)
    result = TeacherEnsemble([ConstantTeacher(one), ConstantTeacher(other)], [1, 3])(view, batch)
    torch.testing.assert_close(result, 0.25 * one + 0.75 * other)
    assert torch.equal(TeacherEnsemble([ConstantTeacher(one)], [0.3])(view, batch), one)


def test_cosines_are_multiplied_by_the_largest_scale_before_distillation():
    cosines, teacher_logits = randn(2, 4, scale=0.3), randn(2, 4, seed=1)
    losses: dict[str, Loss] = {"arcface": ArcFace(scale=16), "distill": Distill()}
    objective = Objective(
        Augment(AugmentConfig(), batch_of(2).split), losses, ConstantTeacher(teacher_logits)
    )

    def model(images: Tensor) -> Outputs:
        return outputs_of(cosines)

    terms, labels = objective(model, batch_of(2)), torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(terms["distill"], apply(Distill(), 16 * cosines, teacher_logits))
    assert torch.equal(terms["arcface"], ArcFace(scale=16)(outputs_of(cosines), labels))


def test_distillation_weight_warms_up_linearly():
    """As in mdistiller: min(epoch / warm-up, 1), epochs counted from 1."""
    loss = DecoupledDistill(weight=2, warmup_epochs=4)
    assert [loss.weight_at(epoch) for epoch in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    assert [Distill(weight=0.7).weight_at(epoch) for epoch in range(3)] == [0.7] * 3
    assert CrossEntropy(weight=0.3).weight_at(0) == 0.3


def test_warm_up_scales_the_sum_but_not_the_reported_term():
    logits, teacher_logits = randn(2, 4), randn(2, 4, seed=1)
    losses: dict[str, Loss] = {
        "cross_entropy": CrossEntropy(weight=0.5),
        "dkd": DecoupledDistill(weight=3, warmup_epochs=20),
    }
    objective = Objective(
        Augment(AugmentConfig(), batch_of(2).split), losses, ConstantTeacher(teacher_logits)
    )
    alone = apply(DecoupledDistill(), logits, teacher_logits, torch.zeros(2, dtype=torch.int64))
    for epoch, factor in ((0, 1 / 20), (4, 1 / 4), (19, 1), (20, 1), (200, 1)):
        batch = replace(batch_of(2), epoch=epoch)
        terms = objective(lambda images: outputs_of(logits), batch)
        assert torch.equal(terms["dkd"], alone)
        expected = 0.5 * terms["cross_entropy"] + factor * 3 * alone
        torch.testing.assert_close(terms["loss"], expected)


def test_losses_of_mixed_images_are_weighted_over_both_labels():
    """A loss that does not use the labels is the same for both; the others and top1 are weighted."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    split = Split(images=images, labels=torch.tensor([0, 1, 2, 3]))
    batch = replace(batch_of(4), split=split)
    logits, teacher_logits = randn(4, 4), randn(4, 4, seed=1)
    losses: dict[str, Loss] = {
        "cross_entropy": CrossEntropy(weight=2),
        "distill": Distill(),
        "dkd": DecoupledDistill(),
    }
    augment = Augment(AugmentConfig(mixup=1.0), split)
    view = augment(batch)
    assert view.lam is not None
    assert view.partner_labels is not None
    terms = Objective(augment, losses, ConstantTeacher(teacher_logits))(
        lambda images: outputs_of(logits), batch
    )
    correct = (logits.argmax(1) == view.labels, logits.argmax(1) == view.partner_labels)
    for row in range(4):
        lam, partner = float(view.lam[row]), int(view.partner_labels[row])
        label_loss = -logits[row].log_softmax(0)[row].item()
        partner_loss = -logits[row].log_softmax(0)[partner].item()
        assert terms["cross_entropy"][row].item() == pytest.approx(
            lam * label_loss + (1 - lam) * partner_loss
        )
        percent = 100 * (lam * float(correct[0][row]) + (1 - lam) * float(correct[1][row]))
        assert terms["top1"][row].item() == pytest.approx(percent)
    torch.testing.assert_close(terms["distill"], apply(Distill(), logits, teacher_logits))
    sides = [
        apply(DecoupledDistill(), logits, teacher_logits, labels)
        for labels in (view.labels, view.partner_labels)
    ]
    torch.testing.assert_close(terms["dkd"], view.lam * sides[0] + (1 - view.lam) * sides[1])


class FirstLineTeacher:
    """Returns the red pixels of an image's first line as logits."""

    local_num_params = 0
    capturable = True

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return view.images[:, 0, 0].float()


def test_teacher_and_student_get_the_same_augmented_images():
    originals = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=originals, labels=torch.zeros(8, dtype=torch.int64))
    batch = gather_batch(split, torch.arange(8), epoch=3, micro_batch=0)
    augment = Augment(AugmentConfig(crop_padding=4, hflip=True, cutout=8), split)
    objective = Objective(augment, {"logit_mse": LogitMse()}, FirstLineTeacher())

    def student(images: Tensor) -> Outputs:
        assert not torch.equal(images, originals)
        return outputs_of(images[:, 0, 0].float())

    assert torch.equal(objective(student, batch)["logit_mse"], torch.zeros(8))
