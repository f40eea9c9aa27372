"""Floor 2. Losses that ask more of the true class than to be the largest: a margin in its logit.

Each is the softmax cross-entropy of `logits(...)`, which an evaluation never sees: it takes the
head's own logits, whose argmax is the decision that the margin was trained for. All of it is done
in float32 with autocast disabled. No angle is computed, since the slope of acos is infinite at 1.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import Angle, Count, NonNegative, Positive, config


@config
class ArcFace(Loss):
    """Softmax cross-entropy of scale * cosines, the true class's angle made larger by `margin`.

    Deng et al. 2019, arXiv 1801.07698, eq. 3: cos(theta) becomes cos(theta + margin). That would
    rise again past theta = pi - margin, where it is -1, so from there on it is the straight line
    cos(theta) + cos(margin) - 1: continuous and falling all the way. (The line of insightface,
    cos(theta) - margin * sin(margin), is the same one with a step down at the joint.)

    `straight_through` keeps the values but passes the gradient as if the margin changed nothing,
    d cos(theta + margin) / d cos(theta) = 1, as code does that edits logits under no_grad.
    """

    head: ClassVar[HeadName | None] = "cosine"
    scale: Positive = 8.0
    margin: Angle = 0.35  # radians
    straight_through: bool = False

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.logits(outputs.logits.float(), labels)
            return F.cross_entropy(logits, labels, reduction="none")

    def logits(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Cosines [B, C] -> what the softmax is taken of [B, C]: the margin is in, and the scale."""
        true = cosines.gather(1, labels[:, None])  # [B, 1]
        # The slope of the sine is infinite at cosines of -1 and 1: stop one float before.
        sine = (1 - true.square()).clamp(min=1e-7).sqrt()
        added = true * math.cos(self.margin) - sine * math.sin(self.margin)
        line = true + (math.cos(self.margin) - 1)
        moved = torch.where(true > -math.cos(self.margin), added, line)
        if self.straight_through:
            moved = true + (moved - true).detach()
        return self.scale * cosines.scatter(1, labels[:, None], moved)


@config
class CosFace(Loss):
    """Softmax cross-entropy of scale * cosines, the true class's cosine made smaller by `margin`.

    Wang et al. 2018, arXiv 1801.09414, eq. 4. To reach probability P with C classes the scale has to
    be at least (C - 1) / C * log((C - 1) * P / (1 - P)) (section 3.3): 6.7 for P = 0.9 of 100 classes.
    The paper's own is 64, for faces of thousands of people.
    """

    head: ClassVar[HeadName | None] = "cosine"
    scale: Positive = 16.0
    margin: NonNegative = 0.35

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.logits(outputs.logits.float(), labels)
            return F.cross_entropy(logits, labels, reduction="none")

    def logits(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Cosines [B, C] -> what the softmax is taken of [B, C]: the margin is in, and the scale."""
        true = cosines.gather(1, labels[:, None])  # [B, 1]
        return self.scale * cosines.scatter(1, labels[:, None], true - self.margin)


def psi(cosine: Tensor, margin: int) -> Tensor:
    """cos(margin * theta), unfolded so that it falls all the way from 1 to 1 - 2 * margin; any shape.

    Liu et al. 2016, arXiv 1612.02295, eq. 5 and 6: (-1)^k cos(margin * theta) - 2k for theta from
    k * pi / margin to (k + 1) * pi / margin. The cosine of the multiple angle is a polynomial
    (Chebyshev's) of the cosine, so values and slopes are finite at all angles; the slope by the
    cosine is margin^2 at 0 and at pi.
    """
    before, multiple = torch.ones_like(cosine), cosine  # cos(0), cos(theta)
    folds = torch.zeros_like(cosine)  # k
    for times in range(1, margin):
        before, multiple = multiple, 2 * cosine * multiple - before
        folds = folds + (cosine < math.cos(times * math.pi / margin))
    return (1 - 2 * (folds % 2)) * multiple - 2 * folds


@config
class SphereFace(Loss):
    """Softmax cross-entropy of length * cosines, the true class's angle multiplied by `margin`.

    Liu et al. 2017, arXiv 1704.08063, eq. 7: the class weights have length 1, an embedding keeps its
    own, and the true class has psi in the place of its cosine (see there).

    `lambda_` is the paper's lambda: the true class has (lambda_ * cos + psi) / (1 + lambda_). Its
    authors let it fall from 1000 to 5 in the course of the training. A loss here does not know the
    step, so it is constant; 5 is where theirs ends.

    `scale` gives all embeddings that length instead of their own (Liu et al. 2022, arXiv 2109.05565,
    hard feature normalization). An evaluation multiplies the cosines by it, by 1 where it is None:
    their argmax is right in any case, as a sample's length is common to its classes, but without a
    scale their softmax is nearly flat, so the test loss says nothing and a teacher needs
    `standardize`.
    """

    head: ClassVar[HeadName | None] = "cosine"
    margin: Count = 4
    lambda_: NonNegative = 5.0
    scale: Positive | None = None

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.logits(outputs.logits.float(), outputs.embedding.float(), labels)
            return F.cross_entropy(logits, labels, reduction="none")

    def logits(self, cosines: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        """Cosines [B, C], embedding [B, D] -> what the softmax is taken of [B, C]."""
        true = cosines.gather(1, labels[:, None])  # [B, 1]
        moved = (self.lambda_ * true + psi(true, self.margin)) / (1 + self.lambda_)
        moved = cosines.scatter(1, labels[:, None], moved)
        if self.scale is not None:
            return self.scale * moved
        return torch.linalg.vector_norm(embedding, dim=1, keepdim=True) * moved


@config
class LargeMarginSoftmax(Loss):
    """Softmax cross-entropy of a linear head's logits, the true class's angle times `margin`.

    L-Softmax, Liu et al. 2016, arXiv 1612.02295, eq. 4: x . w = |x| |w| cos(theta) of the true class
    becomes |x| |w| psi(theta). The paper leaves the bias out. Here the head's bias stays in the
    loss as it is in the logits, so that their argmax is what was trained, and margin 1 is
    cross-entropy. `lambda_` is as with `SphereFace`; the authors' README advises 5 or 10 for
    difficult data, and 0 for easy ones.
    """

    head: ClassVar[HeadName | None] = "linear"
    margin: Count = 2
    lambda_: NonNegative = 5.0

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.logits(Outputs(*(part.float() for part in outputs)), labels)
            return F.cross_entropy(logits, labels, reduction="none")

    def logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """What the softmax is taken of [B, C]; uses all three of the outputs."""
        logits, embedding, class_weight = outputs
        true_weight = class_weight[labels]  # [B, D]
        lengths = [torch.linalg.vector_norm(x, dim=1) for x in (embedding, true_weight)]
        cosine = (F.normalize(embedding) * F.normalize(true_weight)).sum(1)
        change = lengths[0] * lengths[1] * (psi(cosine, self.margin) - cosine) / (1 + self.lambda_)
        true = logits.gather(1, labels[:, None])
        return logits.scatter(1, labels[:, None], true + change[:, None])
