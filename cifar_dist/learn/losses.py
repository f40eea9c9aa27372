"""Floor 2. A loss is its knobs and its formula: outputs and labels in, one number a sample out.

The objective multiplies by `weight` and adds up; no loss here does. A loss that is `taught` compares
the outputs with `guide`, the teacher's logits; the objective has multiplied both by their scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.config import NonNegative, Positive, Share, config
from cifar_dist.learn.distill_losses import DecoupledDistill, Dist, Distill, LogitMse
from cifar_dist.nets.heads import Outputs


class Loss(Protocol):
    """What the objective needs of a loss."""

    head: ClassVar[Literal["cosine"] | None]  # the head it needs; None: any
    taught: ClassVar[bool]  # whether it needs a teacher

    @property
    def weight(self) -> float: ...

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        """labels int64 [B], guide f32 [B, C] -> float32 [B], not yet multiplied by `weight`."""
        ...


@config
class CrossEntropy:
    """Softmax cross-entropy of the logits; with label smoothing as in Szegedy et al. 2016."""

    head: ClassVar[Literal["cosine"] | None] = None
    taught: ClassVar[bool] = False
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
