"""Losses that listen to a teacher: numbers by hand, what must be zero, what must not matter."""

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
from cifar_dist.losses.classification import (
    LOSSES,
    ArcFace,
    CrossEntropy,
    DecoupledDistill,
    Dist,
    Distill,
    LogitMse,
    MarginDistill,
)
from cifar_dist.models.heads import Outputs
from cifar_dist.training.objective import Objective

TAUGHT: list[Loss] = [
    Distill(),
    Distill(temperature=1, standardize=True),
    DecoupledDistill(),
    Dist(),
    LogitMse(),
    MarginDistill(),
]
LOG3 = math.log(3)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(student)) % student.shape[1] if labels is None else labels
    return loss(outputs_of(student), labels, teacher)


def test_distill_by_hand():
    # T = 2 turns log 9 into log 3: teacher (3/4, 1/4), student (1/2, 1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * LOG3, 0.0]])
    wanted = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert apply(Distill(temperature=2), student, teacher).item() == pytest.approx(wanted)


def test_margin_distill_by_hand():
    """Scale 8 and T = 4: cosine 0 of the true class becomes -2 sin(margin), cosine 1 2 cos(margin).

    To 1e-3, since ArcFace takes the sine of angle 0 as 3e-4.
    """
    flat, sure = torch.zeros(1, 2), torch.tensor([[8.0, 0.0]])
    loss, label = MarginDistill(margin=0.35), torch.zeros(1, dtype=torch.int64)
    assert apply(loss, flat, flat, label).item() == pytest.approx(0, abs=1e-6)
    teacher = 1 / (1 + math.exp(-2 * math.cos(0.35)))
    student = 1 / (1 + math.exp(2 * math.sin(0.35)))
    wanted = teacher * math.log(teacher / student)
    wanted += (1 - teacher) * math.log((1 - teacher) / (1 - student))
    assert apply(loss, flat, sure, label).item() == pytest.approx(16 * wanted, rel=1e-3)


def test_margin_distill_is_distill_of_what_arcface_compares():
    """Its gradient is the straight-through one, as that of code which edits logits under no_grad."""
    cosines, teacher_logits = (
        numbers(6, 10, scale=0.3).requires_grad_(),
        numbers(6, 10, seed=1, scale=0.3),
    )
    labels = torch.arange(6)
    for straight_through in (True, False):
        arcface = ArcFace(scale=8, margin=0.35, straight_through=straight_through)
        wanted = apply(
            Distill(), arcface.logits(cosines, labels), arcface.logits(teacher_logits, labels)
        )
        found = apply(
            MarginDistill(straight_through=straight_through), 8 * cosines, 8 * teacher_logits
        )
        torch.testing.assert_close(found, wanted)
        (slope,) = torch.autograd.grad(found.sum(), cosines)
        (expected,) = torch.autograd.grad(wanted.sum(), cosines)
        torch.testing.assert_close(slope, expected)
    assert (apply(MarginDistill(), 8 * cosines, 8 * teacher_logits) != found).sum() == 0
    assert not torch.allclose(apply(Distill(), 8 * cosines, 8 * teacher_logits), found)


def test_distill_is_torchs_divergence_with_the_gradient_of_the_formula():
    student, teacher = numbers(6, 10).requires_grad_(), numbers(6, 10, seed=1)
    temperature = 4.0
    found = apply(Distill(temperature=temperature), student, teacher)
    logs, wanted = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    oracle = temperature**2 * F.kl_div(logs, wanted, reduction="none").sum(1)
    torch.testing.assert_close(found, oracle)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    # Hinton et al., eq. 2, times T^2: T * (student's softmax - teacher's).
    torch.testing.assert_close(gradient, temperature * (logs.exp() - wanted).detach())


def test_dist_is_that_of_cooler_logits_times_the_square():
    student, teacher = numbers(6, 10), numbers(6, 10, seed=1)
    cool = apply(Dist(temperature=1), student / 4, teacher / 4)
    torch.testing.assert_close(apply(Dist(temperature=4), student, teacher), 16 * cool)


def test_standardized_distill_by_hand():
    # (4, 0) and (0, 10) become (1, -1) and (-1, 1): softmax with T = 2 / log 3 gives 3 : 1.
    student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 10.0]])
    loss = Distill(temperature=2 / LOG3, standardize=True)
    wanted = (2 / LOG3) ** 2 * (0.75 * LOG3 - 0.25 * LOG3)
    assert apply(loss, student, teacher).item() == pytest.approx(wanted, rel=1e-5)


def test_standardizing_forgets_size_and_offset():
    student, teacher, loss = numbers(6, 10), numbers(6, 10, seed=1), Distill(standardize=True)
    plain = apply(loss, student, teacher)
    torch.testing.assert_close(apply(loss, 0.1 * student + 3, 50 * teacher - 7), plain)


def test_dkd_by_hand():
    # T = 1, true class 0. Teacher: 1/2 true, the others 3/8 and 1/8. Student: all 1/3.
    teacher = torch.tensor([[math.log(4), LOG3, 0.0]])
    target = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 3 / 2)
    others = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    loss = DecoupledDistill(temperature=1, alpha=2, beta=5)
    found = apply(loss, torch.zeros(1, 3), teacher, torch.tensor([0]))
    assert found.item() == pytest.approx(2 * target + 5 * others)


def test_dkd_with_the_teachers_own_weight_of_the_others_is_distill():
    """Zhao et al. 2022: KL = target + (1 - p) * others, p the teacher's of the true class."""
    student, teacher = numbers(1, 10), numbers(1, 10, seed=1)
    label = torch.tensor([4])
    share = 1 - (teacher / 4).softmax(1)[0, 4].item()
    found = apply(DecoupledDistill(temperature=4, beta=share), student, teacher, label)
    torch.testing.assert_close(found, apply(Distill(temperature=4), student, teacher))


def kd_as_published(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton et al. 2015 as sum over the classes of p_t log(p_t / p_s), times T^2."""
    wanted, found = (logits.div(temperature).softmax(1) for logits in (teacher, student))
    return temperature**2 * (wanted * (wanted / found).log()).sum(1)


def dkd_as_published(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """Zhao et al. 2022 by the steps of their code: two masked sums of the probabilities, and a
    softmax in which the true class's logit is lowered by 1000."""
    is_true = F.one_hot(labels, student.shape[1]).to(student.dtype)

    def two_way(logits: Tensor) -> Tensor:
        probabilities = (logits / temperature).softmax(1)
        return torch.stack([(probabilities * mask).sum(1) for mask in (is_true, 1 - is_true)], 1)

    def among_others(logits: Tensor) -> Tensor:
        return (logits / temperature - 1000 * is_true).log_softmax(1)

    wanted, found = two_way(teacher), two_way(student)
    target = (wanted * (wanted.log() - found.log())).sum(1)
    wanted, found = among_others(teacher), among_others(student)
    others = (wanted.exp() * (wanted - found)).sum(1)
    return temperature**2 * (alpha * target + beta * others)


@pytest.mark.parametrize("scale", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("kind", ["distill", "dkd"])
def test_values_and_gradients_are_the_published_ones_in_float64(kind: str, scale: float):
    """What both papers' settings are on CIFAR-100: T = 4, alpha = 1, beta = 8."""
    student, teacher = numbers(64, 100, scale=scale), numbers(64, 100, seed=1, scale=scale)
    labels = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(2))
    loss: Loss = DecoupledDistill() if kind == "dkd" else Distill()
    student.requires_grad_()
    found = apply(loss, student, teacher, labels)
    precise = student.detach().double().requires_grad_()
    if kind == "dkd":
        wanted = dkd_as_published(precise, teacher.double(), labels, temperature=4, alpha=1, beta=8)
    else:
        wanted = kd_as_published(precise, teacher.double(), 4)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    weights = torch.arange(1.0, 65.0)  # each sample's gradient on its own
    (gradient,) = torch.autograd.grad((weights * found).sum(), student)
    (oracle,) = torch.autograd.grad((weights * wanted).sum(), precise)
    torch.testing.assert_close(gradient.double(), oracle, rtol=1e-4, atol=1e-4)
    assert oracle.abs().max() > 1


def test_dist_by_hand():
    # softmax of (log 3, 0), (0, log 3), (0, 0): first class 3/4, 1/4, 1/2. Over two classes each
    # sample correlates with 1 or -1; the third, whose classes are equal, with nothing: 0.
    student = torch.tensor([[LOG3, 0.0], [0.0, LOG3], [0.0, 0.0]])
    teacher = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [0.0, LOG3]])
    # Centred over the samples: student (1, -1, 0) / 4, teacher (1, 0, -1) / 4: correlation 1/2.
    found = apply(Dist(temperature=1, inter=2, intra=3), student, teacher)
    wanted = torch.tensor([0.0, 2.0, 2.0]) + 3 * 0.5
    torch.testing.assert_close(found, wanted)


def test_dist_keeps_with_a_linear_change_of_the_probabilities():
    """Huang et al.: what counts is the relation, so p and (p + 1/C) / 2 are the same to it."""
    student = numbers(16, 10)
    flattened = ((student.softmax(1) + 0.1) / 2).log()
    found = apply(Dist(temperature=1), student, flattened)
    torch.testing.assert_close(found, torch.zeros(16), rtol=0, atol=1e-5)


def test_dist_spreads_what_couples_the_samples_of_a_shard_evenly():
    student, teacher = numbers(8, 10), numbers(8, 10, seed=1)
    intra = apply(Dist(inter=0), student, teacher)
    assert torch.equal(intra, intra[:1].expand(8))
    inter = apply(Dist(intra=0), student, teacher)
    torch.testing.assert_close(inter[:3], apply(Dist(intra=0), student[:3], teacher[:3]))


def test_logit_mse_by_hand():
    found = apply(LogitMse(), torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]))
    assert found.item() == 12.5


@pytest.mark.parametrize("loss", TAUGHT, ids=repr)
def test_equal_logits_teach_nothing(loss: Loss):
    logits = numbers(16, 10).requires_grad_()
    found = apply(loss, logits, logits.detach())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found, torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, torch.zeros(16, 10), rtol=0, atol=1e-4)
    assert (apply(loss, logits, numbers(16, 10, seed=1)) > 0.01).all()


@pytest.mark.parametrize("loss", TAUGHT, ids=repr)
def test_the_order_of_samples_and_classes_does_not_matter(loss: Loss):
    student, teacher, labels = numbers(16, 10), numbers(16, 10, seed=1), torch.arange(16) % 10
    found = apply(loss, student, teacher, labels)
    samples, classes = torch.randperm(16), torch.randperm(10)
    moved = apply(loss, student[samples], teacher[samples], labels[samples])
    torch.testing.assert_close(moved, found[samples])
    renamed = apply(loss, student[:, classes], teacher[:, classes], classes.argsort()[labels])
    torch.testing.assert_close(renamed, found)


@pytest.mark.parametrize(
    "loss", [loss for loss in TAUGHT if loss not in (LogitMse(), MarginDistill())], ids=repr
)
def test_an_offset_of_all_logits_does_not_matter(loss: Loss):
    student, teacher = numbers(16, 10), numbers(16, 10, seed=1)
    moved = apply(loss, student + 5, teacher - 3)
    torch.testing.assert_close(moved, apply(loss, student, teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", TAUGHT, ids=repr)
def test_certain_teachers_and_students_give_finite_numbers(loss: Loss):
    certain = 500 * F.one_hot(torch.arange(8) % 4, 4).float()
    student = certain.flip(0).requires_grad_()
    found = apply(loss, student, certain)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", TAUGHT, ids=repr)
def test_taught_losses_are_float32_with_the_same_bits_under_autocast(loss: Loss):
    student, teacher = numbers(8, 5), numbers(8, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(loss, student, teacher)
    assert found.dtype == torch.float32
    assert found.shape == (8,)
    assert torch.equal(found, apply(loss, student, teacher))
    assert apply(loss, student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_every_taught_loss_is_tested_here():
    assert {type(loss) for loss in TAUGHT} == {
        kind for kind in LOSSES.values() if kind.needs_teacher
    }


class Says:
    """A teacher that says the same whatever it sees."""

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


def test_several_teachers_are_averaged_by_their_weights():
    batch = batch_of(2)
    view = AugmentedBatch(images=batch.images, labels=batch.labels, view_ids=batch.rows)
    one, other = numbers(2, 4), numbers(2, 4, seed=1)
    found = TeacherEnsemble([Says(one), Says(other)], [1, 3])(view, batch)
    torch.testing.assert_close(found, 0.25 * one + 0.75 * other)
    assert torch.equal(TeacherEnsemble([Says(one)], [0.3])(view, batch), one)


def test_a_students_cosines_are_taught_at_the_scale_of_its_other_losses():
    cosines, teacher_logits = numbers(2, 4, scale=0.3), numbers(2, 4, seed=1)
    losses: dict[str, Loss] = {"arcface": ArcFace(scale=16), "distill": Distill()}
    objective = Objective(Augment(AugmentConfig(), batch_of(2).split), losses, Says(teacher_logits))

    def model(images: Tensor) -> Outputs:
        return outputs_of(cosines)

    terms, labels = objective(model, batch_of(2)), torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(terms["distill"], apply(Distill(), 16 * cosines, teacher_logits))
    assert torch.equal(terms["arcface"], ArcFace(scale=16)(outputs_of(cosines), labels))


def test_the_weight_of_a_taught_loss_rises_over_its_first_epochs():
    """mdistiller: min(epoch / warm-up, 1), epochs counted from 1."""
    loss = DecoupledDistill(weight=2, warmup_epochs=4)
    assert [loss.weight_at(epoch) for epoch in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    assert [Distill(weight=0.7).weight_at(epoch) for epoch in range(3)] == [0.7] * 3
    assert CrossEntropy(weight=0.3).weight_at(0) == 0.3


def test_a_warm_up_changes_the_sum_and_not_the_reported_term():
    logits, teacher_logits = numbers(2, 4), numbers(2, 4, seed=1)
    losses: dict[str, Loss] = {
        "cross_entropy": CrossEntropy(weight=0.5),
        "dkd": DecoupledDistill(weight=3, warmup_epochs=20),
    }
    objective = Objective(Augment(AugmentConfig(), batch_of(2).split), losses, Says(teacher_logits))
    alone = apply(DecoupledDistill(), logits, teacher_logits, torch.zeros(2, dtype=torch.int64))
    for epoch, share in ((0, 1 / 20), (4, 1 / 4), (19, 1), (20, 1), (200, 1)):
        batch = replace(batch_of(2), epoch=epoch)
        terms = objective(lambda images: outputs_of(logits), batch)
        assert torch.equal(terms["dkd"], alone)
        wanted = 0.5 * terms["cross_entropy"] + share * 3 * alone
        torch.testing.assert_close(terms["loss"], wanted)


def test_of_mixed_pictures_each_loss_is_the_mean_over_both_labels_by_share():
    """What listens to a teacher alone does not change; losses and top1 do."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    split = Split(images=images, labels=torch.tensor([0, 1, 2, 3]))
    batch = replace(batch_of(4), split=split)
    logits, teacher_logits = numbers(4, 4), numbers(4, 4, seed=1)
    losses: dict[str, Loss] = {
        "cross_entropy": CrossEntropy(weight=2),
        "distill": Distill(),
        "dkd": DecoupledDistill(),
    }
    augment = Augment(AugmentConfig(mixup=1.0), split)
    view = augment(batch)
    assert view.lam is not None
    assert view.partner_labels is not None
    terms = Objective(augment, losses, Says(teacher_logits))(
        lambda images: outputs_of(logits), batch
    )
    right = (logits.argmax(1) == view.labels, logits.argmax(1) == view.partner_labels)
    for row in range(4):
        share, partner = float(view.lam[row]), int(view.partner_labels[row])
        own = -logits[row].log_softmax(0)[row].item()
        other = -logits[row].log_softmax(0)[partner].item()
        assert terms["cross_entropy"][row].item() == pytest.approx(
            share * own + (1 - share) * other
        )
        percent = 100 * (share * float(right[0][row]) + (1 - share) * float(right[1][row]))
        assert terms["top1"][row].item() == pytest.approx(percent)
    torch.testing.assert_close(terms["distill"], apply(Distill(), logits, teacher_logits))
    sides = [
        apply(DecoupledDistill(), logits, teacher_logits, labels)
        for labels in (view.labels, view.partner_labels)
    ]
    torch.testing.assert_close(terms["dkd"], view.lam * sides[0] + (1 - view.lam) * sides[1])


class SeesFirstLine:
    """A teacher whose logits are the red pixels of a picture's first line."""

    local_num_params = 0
    capturable = True

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return view.images[:, 0, 0].float()


def test_teacher_and_student_see_the_same_view():
    pictures = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=pictures, labels=torch.zeros(8, dtype=torch.int64))
    batch = gather_batch(split, torch.arange(8), epoch=3, micro_batch=0)
    augment = Augment(AugmentConfig(crop_padding=4, hflip=True, cutout=8), split)
    objective = Objective(augment, {"logit_mse": LogitMse()}, SeesFirstLine())

    def student(images: Tensor) -> Outputs:
        assert not torch.equal(images, pictures)
        return outputs_of(images[:, 0, 0].float())

    assert torch.equal(objective(student, batch)["logit_mse"], torch.zeros(8))
