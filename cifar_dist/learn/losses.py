"""Floor 2. A loss is its knobs and its formula: outputs and labels in, one number a sample out.

The objective multiplies by `weight` and adds up; no loss here does. A loss that is `taught` compares
the outputs with `guide`, the teacher's logits; the objective has multiplied both by their scale, and
lets the loss's weight rise over its first `warmup_epochs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.config import Index, NonNegative, Positive, Share, config
from cifar_dist.nets.heads import Outputs


class Loss(Protocol):
    """What the objective needs of a loss."""

    head: ClassVar[Literal["cosine"] | None]  # the head it needs; None: any
    taught: ClassVar[bool]  # whether it needs a teacher

    @property
    def weight(self) -> float: ...

    @property
    def warmup_epochs(self) -> int: ...  # in which its weight rises linearly; 0: it does not

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        """labels int64 [B], guide f32 [B, C] -> float32 [B], not yet multiplied by `weight`."""
        ...


@config
class CrossEntropy:
    """Softmax cross-entropy of the logits; with label smoothing as in Szegedy et al. 2016."""

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = False
    warmup_epochs: ClassVar[int] = 0
    weight: NonNegative = 1.0
    label_smoothing: Share = 0.0

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        smoothing = self.label_smoothing
        return F.cross_entropy(
            outputs.logits.float(), labels, reduction="none", label_smoothing=smoothing
        )


@config
class ArcFace:
    """Softmax cross-entropy of scale * cosines, the true class's angle made larger by `margin`.

    Deng et al. 2019, arXiv 1801.07698, eq. 3: cos(theta) becomes cos(theta + margin). That would
    rise again past theta = pi - margin, where it is -1, so from there on it is the straight line
    cos(theta) + cos(margin) - 1: continuous and falling all the way. (The line of insightface,
    cos(theta) - margin * sin(margin), is the same one with a step down at the joint.)

    `straight_through` keeps the values but passes the gradient as if the margin changed nothing,
    d cos(theta + margin) / d cos(theta) = 1, as code does that edits logits under no_grad.
    """

    head: ClassVar[Literal["cosine"] | None] = "cosine"
    taught: ClassVar[bool] = False
    warmup_epochs: ClassVar[int] = 0
    weight: NonNegative = 1.0
    scale: Positive = 8.0
    margin: NonNegative = 0.35  # radians
    straight_through: bool = False

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            cosines = outputs.logits.float()  # [B, C]
            true = cosines.gather(1, labels[:, None])  # [B, 1]
            # The slope of the sine is infinite at cosines of -1 and 1: stop one float before.
            sine = (1 - true.square()).clamp(min=1e-7).sqrt()
            added = true * math.cos(self.margin) - sine * math.sin(self.margin)
            line = true + (math.cos(self.margin) - 1)
            moved = torch.where(true > -math.cos(self.margin), added, line)
            if self.straight_through:
                moved = true + (moved - true).detach()
            logits = self.scale * cosines.scatter(1, labels[:, None], moved)
            return F.cross_entropy(logits, labels, reduction="none")


# ----------------------------------------------------------------------------- from a teacher


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits over the last dimension, [..., C] -> [...]."""
    wanted, found = teacher.log_softmax(-1), student.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


@config
class Distill:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)). Hinton et al. 2015, arXiv 1503.02531.

    T^2 keeps the gradient's size when T changes. `standardize` first gives each sample's logits mean
    0 and deviation 1 over the classes, so that only their shape is taught, and T no longer depends
    on how large the teacher's logits are. Sun et al. 2024, arXiv 2403.01427, whose code divides by
    C - 1 in the deviation, as if T were 0.5 % larger at 100 classes.
    """

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = True
    weight: NonNegative = 1.0
    warmup_epochs: Index = 0
    temperature: Positive = 4.0
    standardize: bool = False

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        assert guide is not None
        with torch.autocast(labels.device.type, enabled=False):
            student, teacher = outputs.logits.float(), guide.float()
            if self.standardize:
                classes = student.shape[-1:]
                student, teacher = (F.layer_norm(x, classes, eps=1e-7) for x in (student, teacher))
            temperature = self.temperature
            return temperature**2 * divergence(teacher / temperature, student / temperature)


@config
class DecoupledDistill:
    """T^2 * (target * KL(true class or not) + others * KL(among the other classes)).

    Zhao et al. 2022, arXiv 2203.08679. With others = 1 - the teacher's probability of the
    true class (another for each sample), and target = 1, this would be `Distill`.
    """

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = True
    weight: NonNegative = 1.0
    warmup_epochs: Index = 0
    temperature: Positive = 4.0
    target: NonNegative = 1.0  # alpha in the paper
    others: NonNegative = 8.0  # beta

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        assert guide is not None
        with torch.autocast(labels.device.type, enabled=False):
            classes = torch.arange(guide.shape[1], device=labels.device)
            is_true = classes == labels[:, None]
            lowest = torch.finfo(torch.float32).min / 4  # -inf would give 0 * inf

            def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
                """(logits of the true class and of all others as one, those of the others) [B, 2], [B, C]."""
                scaled = logits.float() / self.temperature
                others = scaled.masked_fill(is_true, lowest)
                true = scaled.gather(1, labels[:, None])
                return torch.cat([true, others.logsumexp(1, keepdim=True)], 1), others

            student, teacher = parts(outputs.logits), parts(guide)
            target, others = (divergence(t, s) for t, s in zip(teacher, student, strict=True))
            return self.temperature**2 * (self.target * target + self.others * others)


@config
class Dist:
    """T^2 * (inter * (1 - correlation over classes) + intra * (1 - correlation over samples)).

    Pearson's correlation of the teacher's and the student's softmax(logits / T): for each sample over
    the classes, and for each class over the samples of the shard, whose mean over the classes is
    spread over [B]. Huang et al. 2022, arXiv 2205.10536; T^2 as with `Distill`.
    """

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = True
    weight: NonNegative = 1.0
    warmup_epochs: Index = 0
    temperature: Positive = 4.0
    inter: NonNegative = 1.0
    intra: NonNegative = 1.0

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        assert guide is not None
        with torch.autocast(labels.device.type, enabled=False):
            student = (outputs.logits.float() / self.temperature).softmax(1)
            teacher = (guide.float() / self.temperature).softmax(1)

            def distance(dimension: int) -> Tensor:
                one, other = (x - x.mean(dimension, keepdim=True) for x in (student, teacher))
                return 1 - F.cosine_similarity(one, other, dim=dimension)

            terms = self.inter * distance(1) + self.intra * distance(0).mean()
            return self.temperature**2 * terms


@config
class LogitMse:
    """The mean over the classes of (student - teacher)^2, of the logits themselves.

    Ba and Caruana 2014, arXiv 1312.6184, but for a constant; Kim et al. 2021, arXiv 2105.08919.
    """

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = True
    weight: NonNegative = 1.0
    warmup_epochs: Index = 0

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        assert guide is not None
        with torch.autocast(labels.device.type, enabled=False):
            return (outputs.logits.float() - guide.float()).square().mean(1)


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "arcface": ArcFace,
    "distill": Distill,
    "dkd": DecoupledDistill,
    "dist": Dist,
    "logit_mse": LogitMse,
}


def logit_scale(losses: Iterable[Loss]) -> float:
    """What makes a softmax of cosines mean something: the largest `scale` among the losses, or 1."""
    return max((loss.scale for loss in losses if hasattr(loss, "scale")), default=1.0)
