"""Floor 2. Losses that listen to a teacher: they compare the outputs with `guide`, its logits.

The objective has multiplied the logits of both by their scale.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.losses.margin import ArcFace
from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import Angle, Index, NonNegative, Positive, config


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits over the last dimension, [..., C] -> [...]."""
    wanted, found = teacher.log_softmax(-1), student.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


@config
class DistillationLoss(Loss):
    """A loss of this file. The n epochs of a warm-up have 1/n, 2/n, ... of its weight.

    As in the code of Zhao et al. 2022 (megvii-research/mdistiller), which counts epochs from 1.
    """

    needs_teacher: ClassVar[bool] = True
    warmup_epochs: Index = 0

    def weight_at(self, epoch: int) -> float:
        if epoch >= self.warmup_epochs:
            return self.weight
        return self.weight * (epoch + 1) / self.warmup_epochs


@config
class Distill(DistillationLoss):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)). Hinton et al. 2015, arXiv 1503.02531.

    T^2 keeps the gradient's size when T changes. `standardize` first gives each sample's logits mean
    0 and deviation 1 over the classes, so that only their shape is taught, and T no longer depends
    on how large the teacher's logits are. Sun et al. 2024, arXiv 2403.01427, whose code divides by
    C - 1 in the deviation, as if T were 0.5 % larger at 100 classes.
    """

    temperature: Positive = 4.0
    standardize: bool = False

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        assert teacher_logits is not None
        with torch.autocast(labels.device.type, enabled=False):
            student, teacher = outputs.logits.float(), teacher_logits.float()
            if self.standardize:
                classes = student.shape[-1:]
                student, teacher = (F.layer_norm(x, classes, eps=1e-7) for x in (student, teacher))
            temperature = self.temperature
            return temperature**2 * kl_divergence(teacher / temperature, student / temperature)


@config
class MarginDistill(DistillationLoss):
    """`Distill` of logits into which ArcFace's margin has been put on both sides, at the true class.

    As the tutorial's code has it, for its own row alone: the margin makes the teacher less sure of
    the true class than it is. `scale` is what the teacher's and the student's cosines come multiplied
    with, that of both their losses.
    """

    head: ClassVar[HeadName | None] = "cosine"
    supports_mixup: ClassVar[bool] = False
    temperature: Positive = 4.0
    scale: Positive = 8.0
    margin: Angle = 0.35  # radians
    straight_through: bool = True

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        assert teacher_logits is not None
        with torch.autocast(labels.device.type, enabled=False):
            arcface = ArcFace(
                scale=self.scale, margin=self.margin, straight_through=self.straight_through
            )
            student, teacher = (
                arcface.logits(logits.float() / self.scale, labels) / self.temperature
                for logits in (outputs.logits, teacher_logits)
            )
            return self.temperature**2 * kl_divergence(teacher, student)


@config
class DecoupledDistill(DistillationLoss):
    """T^2 * (target * KL(true class or not) + others * KL(among the other classes)).

    Zhao et al. 2022, arXiv 2203.08679. With others = 1 - the teacher's probability of the
    true class (another for each sample), and target = 1, this would be `Distill`.
    """

    temperature: Positive = 4.0
    alpha: NonNegative = 1.0  # alpha in the paper
    beta: NonNegative = 8.0  # beta

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        assert teacher_logits is not None
        with torch.autocast(labels.device.type, enabled=False):
            classes = torch.arange(teacher_logits.shape[1], device=labels.device)
            is_true = classes == labels[:, None]
            lowest = torch.finfo(torch.float32).min / 4  # -inf would give 0 * inf

            def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
                """(logits of the true class and of all others as one, those of the others) [B, 2], [B, C]."""
                scaled = logits.float() / self.temperature
                others = scaled.masked_fill(is_true, lowest)
                true = scaled.gather(1, labels[:, None])
                return torch.cat([true, others.logsumexp(1, keepdim=True)], 1), others

            student, teacher = parts(outputs.logits), parts(teacher_logits)
            target, others = (kl_divergence(t, s) for t, s in zip(teacher, student, strict=True))
            return self.temperature**2 * (self.alpha * target + self.beta * others)


@config
class Dist(DistillationLoss):
    """T^2 * (inter * (1 - correlation over classes) + intra * (1 - correlation over samples)).

    Pearson's correlation of the teacher's and the student's softmax(logits / T): for each sample over
    the classes, and for each class over the samples of the micro-batch, whose mean over the classes is
    spread over [B]. Huang et al. 2022, arXiv 2205.10536; T^2 as with `Distill`.
    """

    temperature: Positive = 4.0
    inter: NonNegative = 1.0
    intra: NonNegative = 1.0

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        assert teacher_logits is not None
        with torch.autocast(labels.device.type, enabled=False):
            student = (outputs.logits.float() / self.temperature).softmax(1)
            teacher = (teacher_logits.float() / self.temperature).softmax(1)

            def distance(dimension: int) -> Tensor:
                one, other = (x - x.mean(dimension, keepdim=True) for x in (student, teacher))
                return 1 - F.cosine_similarity(one, other, dim=dimension)

            terms = self.inter * distance(1) + self.intra * distance(0).mean()
            return self.temperature**2 * terms


@config
class LogitMse(DistillationLoss):
    """The mean over the classes of (student - teacher)^2, of the logits themselves.

    Ba and Caruana 2014, arXiv 1312.6184, but for a constant; Kim et al. 2021, arXiv 2105.08919.
    """

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        assert teacher_logits is not None
        with torch.autocast(labels.device.type, enabled=False):
            return (outputs.logits.float() - teacher_logits.float()).square().mean(1)
