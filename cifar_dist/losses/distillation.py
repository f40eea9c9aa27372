"""Losses that compare the student's logits with the teacher's.

The caller multiplies both by their logit scale.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.losses.margin import ArcFace
from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import Angle, Factor, Index, NonNegative, Positive, config


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits over the last dimension, [..., C] -> [...]."""
    teacher_log, student_log = teacher.log_softmax(-1), student.log_softmax(-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


@config
class DistillationLoss(Loss):
    """Base class: a loss with a teacher, whose weight rises linearly over `warmup_epochs` epochs.

    Epoch i of n has i / n of the weight, counted from 1, as in the code of Zhao et al. 2022
    (megvii-research/mdistiller). `standardize` first gives each sample's logits mean 0 and standard
    deviation 1 over the classes, so that only their shape is compared and the best T does not depend on
    the teacher's logit scale. Sun et al. 2024, arXiv 2403.01427; their code divides by C - 1 in the
    deviation, like a T that is 0.5 % larger at 100 classes.
    """

    needs_teacher: ClassVar[bool] = True
    warmup_epochs: Index = 0  # epochs over which the weight rises linearly; 0: none
    standardize: bool = False  # first give the logits of each sample mean 0 and deviation 1

    def weight_at(self, epoch: int) -> float:
        if epoch >= self.warmup_epochs:
            return self.weight
        return self.weight * (epoch + 1) / self.warmup_epochs

    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        assert teacher_logits is not None
        student, teacher = outputs.logits, teacher_logits
        if self.standardize:
            classes = student.shape[-1:]
            student, teacher = (F.layer_norm(x, classes, eps=1e-7) for x in (student, teacher))
        return self.compare(student, teacher, labels)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample, [B], from logits [B, C]."""


@config
class Distill(DistillationLoss):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)). Hinton et al. 2015, arXiv 1503.02531.

    T^2 makes the size of the gradient independent of T.
    """

    temperature: Positive = 4.0  # divisor of the logits

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        temperature = self.temperature
        return temperature**2 * kl_divergence(teacher / temperature, student / temperature)


@config
class MarginDistill(DistillationLoss):
    """`Distill` with ArcFace's margin in the true class's logit of both student and teacher.

    As in the tutorial's code, for the tutorial's row only: the margin makes the teacher less
    confident in the true class. `scale` is the factor by which the teacher's and the student's
    cosines have been multiplied, that of both their losses.
    """

    head: ClassVar[HeadName | None] = "cosine"
    supports_mixup: ClassVar[bool] = False
    temperature: Positive = 4.0  # divisor of the logits
    scale: Positive = 8.0  # factor on the cosines in the losses of teacher and student
    margin: Angle = 0.35  # added to the angle of the true class, in radians
    straight_through: bool = True  # ignore the margin in the gradient

    def __post_init__(self) -> None:
        if self.standardize:
            raise ValueError("margin_distill needs cosines: remove standardize")

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        arcface = ArcFace(
            scale=self.scale, margin=self.margin, straight_through=self.straight_through
        )
        student, teacher = (
            arcface.add_margin(logits / self.scale, labels) / self.temperature
            for logits in (student, teacher)
        )
        return self.temperature**2 * kl_divergence(teacher, student)


@config
class DecoupledDistill(DistillationLoss):
    """T^2 * (alpha * KL(true class against the rest) + beta * KL(among the other classes)).

    Zhao et al. 2022, arXiv 2203.08679. With alpha = 1 and beta = 1 - the teacher's probability of
    the true class (per sample) this would be `Distill`.
    """

    temperature: Positive = 4.0  # divisor of the logits
    alpha: NonNegative = 1.0  # weight of the true class against the rest
    beta: NonNegative = 8.0  # weight of the other classes among themselves

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        classes = torch.arange(teacher.shape[1], device=labels.device)
        is_true = classes == labels[:, None]
        lowest = torch.finfo(torch.float32).min / 4  # -inf would give 0 * inf

        def decouple(logits: Tensor) -> tuple[Tensor, Tensor]:
            """Return logits of true class and rest [B, 2], and of the other classes [B, C]."""
            scaled = logits / self.temperature
            others = scaled.masked_fill(is_true, lowest)
            true = scaled.gather(1, labels[:, None])
            return torch.cat([true, others.logsumexp(1, keepdim=True)], 1), others

        pairs = zip(decouple(student), decouple(teacher), strict=True)
        target, others = (kl_divergence(t, s) for s, t in pairs)
        return self.temperature**2 * (self.alpha * target + self.beta * others)


@config
class Dist(DistillationLoss):
    """T^2 * (inter * (1 - correlation over classes) + intra * (1 - correlation over samples)).

    Pearson correlation of the teacher's and the student's softmax(logits / T): for each sample over
    the classes, and for each class over the samples of the micro-batch; every sample gets the mean of
    the latter over the classes. Huang et al. 2022, arXiv 2205.10536; T^2 as with `Distill`.
    """

    temperature: Positive = 4.0  # divisor of the logits
    inter: NonNegative = 1.0  # weight of the correlation over the classes of a sample
    intra: NonNegative = 1.0  # weight of the correlation over the samples of a class

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = ((x / self.temperature).softmax(1) for x in (student, teacher))

        def distance(dim: int) -> Tensor:
            centered = [x - x.mean(dim, keepdim=True) for x in (student, teacher)]
            return 1 - F.cosine_similarity(centered[0], centered[1], dim=dim)

        terms = self.inter * distance(1) + self.intra * distance(0).mean()
        return self.temperature**2 * terms


@config
class TransformedTeacher(DistillationLoss):
    """KL(q || softmax(student)) times the sum of p^gamma, where q is p^gamma, normalized.

    p is the teacher's softmax; unlike in `Distill` the student has no temperature. The factor is larger
    for uncertain teachers; without it (`weighted: false`) this is TTM, otherwise WTTM. Zheng and Yang
    2024, arXiv 2402.11148; settings of their code (github zkxufo/TTM): gamma 0.1 or 0.2.
    """

    gamma: Factor = 0.2  # exponent of the teacher's probabilities; 1 / temperature
    weighted: bool = True  # multiply by the sum of the teacher's probabilities to the power gamma

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        divergence = kl_divergence(self.gamma * teacher, student)
        if not self.weighted:
            return divergence
        power_sum = (self.gamma * teacher.log_softmax(1)).logsumexp(1).exp()
        return power_sum * divergence


@config
class MultiLevel(DistillationLoss):
    """Sum over temperatures T of three comparisons of P = softmax(logits / T), [B, C].

    T^2 * KL for each sample, |P P' - Q Q'|^2 / B over pairs of samples and |P' P - Q' Q|^2 / C over pairs
    of classes, Q of the teacher. The last two compare the samples of a micro-batch; the sum over
    pairs of classes is given to each sample. Jin et al. 2023, CVPR, eq. 2, 6 and 9; not included are the
    two augmentations of an image and the masks of their code (github Jin-Ying/Multi-Level-Logit-Distillation).
    """

    temperatures: tuple[Positive, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)  # divisors of the logits
    batch: NonNegative = 1.0  # weight of the comparison over pairs of samples
    classes: NonNegative = 1.0  # weight of the comparison over pairs of classes

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros_like(student[:, 0])
        for temperature in self.temperatures:
            total = total + temperature**2 * kl_divergence(
                teacher / temperature, student / temperature
            )
            p, q = ((x / temperature).softmax(1) for x in (student, teacher))
            # The mean over the samples is the sum over all pairs, divided by B.
            total = total + self.batch * (p @ p.T - q @ q.T).square().sum(1)
            over_classes = (p.T @ p - q.T @ q).square().sum() / student.shape[1]
            total = total + self.classes * over_classes
        return total


@config
class LogitMse(DistillationLoss):
    """Mean over the classes of (student - teacher)^2 of the logits.

    Ba and Caruana 2014, arXiv 1312.6184, up to a constant factor; Kim et al. 2021, arXiv 2105.08919.
    """

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return (student - teacher).square().mean(1)
