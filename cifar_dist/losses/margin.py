"""Softmax losses with a margin on the logit of the true class.

Evaluation uses the head's logits without the margin; their argmax is the decision that is trained.
No angle is computed, as the gradient of acos is infinite at 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import Angle, Count, NonNegative, Positive, config


@config
class MarginLoss(Loss):
    """Base class: softmax cross-entropy of `margin_logits`."""

    head: ClassVar[HeadName | None] = "cosine"

    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        return F.cross_entropy(self.margin_logits(outputs, labels), labels, reduction="none")

    @abstractmethod
    def margin_logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the logits with the margin applied and the cosines scaled, [B, C]."""


@config
class ArcFace(MarginLoss):
    """Softmax cross-entropy of scale * cosines, with `margin` added to the true class's angle.

    Deng et al. 2019, arXiv 1801.07698, eq. 3: cos(theta) becomes cos(theta + margin). That would rise
    again beyond theta = pi - margin, where it is -1, so it continues there as the line cos(theta) +
    cos(margin) - 1, which is continuous and decreasing. (The line of insightface, cos(theta) - margin *
    sin(margin), is the same one with a step down at the joint.)

    `straight_through` keeps the values, but its gradient ignores the margin, d cos(theta + margin) /
    d cos(theta) = 1, as in code that edits the logits under no_grad.
    """

    scale: Positive = 8.0  # factor on the cosines before the softmax
    margin: Angle = 0.35  # added to the angle of the true class, in radians
    straight_through: bool = False  # ignore the margin in the gradient

    def margin_logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return self.add_margin(outputs.logits, labels)

    def add_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Return scale * cosines [B, C] with the margin in the column of the label."""
        true = cosines.gather(1, labels[:, None])  # [B, 1]
        # The derivative of the sine is infinite at cosines of -1 and 1: stop one float before.
        sine = (1 - true.square()).clamp(min=1e-7).sqrt()
        added = true * math.cos(self.margin) - sine * math.sin(self.margin)
        line = true + (math.cos(self.margin) - 1)
        shifted = torch.where(true > -math.cos(self.margin), added, line)
        if self.straight_through:
            shifted = true + (shifted - true).detach()
        return self.scale * cosines.scatter(1, labels[:, None], shifted)


@config
class CosFace(MarginLoss):
    """Softmax cross-entropy of scale * cosines, with `margin` subtracted from the true class's cosine.

    Wang et al. 2018, arXiv 1801.09414, eq. 4. To reach probability P with C classes the scale must be
    at least (C - 1) / C * log((C - 1) * P / (1 - P)) (section 3.3): 6.7 for P = 0.9 and 100 classes.
    The paper uses 64, for faces of thousands of people.
    """

    scale: Positive = 16.0  # factor on the cosines before the softmax
    margin: NonNegative = 0.35  # subtracted from the cosine of the true class

    def margin_logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        true = outputs.logits.gather(1, labels[:, None])  # [B, 1]
        return self.scale * outputs.logits.scatter(1, labels[:, None], true - self.margin)


def psi(cosine: Tensor, margin: int) -> Tensor:
    """Return cos(margin * theta), unfolded to decrease from 1 to 1 - 2 * margin; any shape.

    Liu et al. 2016, arXiv 1612.02295, eq. 5 and 6: (-1)^k cos(margin * theta) - 2k for theta from
    k * pi / margin to (k + 1) * pi / margin. The cosine of a multiple angle is a polynomial
    (Chebyshev's) of the cosine, so values and gradients are finite at all angles; the derivative with
    respect to the cosine is margin^2 at 0 and at pi.
    """
    previous, multiple = torch.ones_like(cosine), cosine  # cos(0), cos(theta)
    folds = torch.zeros_like(cosine)  # k
    for times in range(1, margin):
        previous, multiple = multiple, 2 * cosine * multiple - previous
        folds = folds + (cosine < math.cos(times * math.pi / margin))
    return (1 - 2 * (folds % 2)) * multiple - 2 * folds


@config
class SphereFace(MarginLoss):
    """Softmax cross-entropy of length * cosines, with the true class's angle multiplied by `margin`.

    Liu et al. 2017, arXiv 1704.08063, eq. 7: the class weights have length 1, an embedding keeps its
    length, and the true class has psi instead of its cosine (see `psi`).

    `lambda_` is the paper's lambda: the true class has (lambda_ * cos + psi) / (1 + lambda_). The
    authors lower it from 1000 to 5 during training. Here it is constant, as a loss does not know the
    step; 5 is their final value.

    `scale` gives all embeddings this length instead of their own (Liu et al. 2022, arXiv 2109.05565,
    hard feature normalization). Evaluation multiplies the cosines by it, or by 1 for None. The argmax
    is the same either way, as a sample's length is common to its classes. But without a scale the
    softmax is nearly flat: the test loss means little, and a teacher needs `standardize`.
    """

    margin: Count = 4  # factor on the angle of the true class
    lambda_: NonNegative = 5.0  # weight of the logit without margin, relative to that with
    scale: Positive | None = None  # length that all embeddings get; null: their own length

    def margin_logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        true = outputs.logits.gather(1, labels[:, None])  # [B, 1]
        shifted = (self.lambda_ * true + psi(true, self.margin)) / (1 + self.lambda_)
        cosines = outputs.logits.scatter(1, labels[:, None], shifted)
        if self.scale is not None:
            return self.scale * cosines
        return torch.linalg.vector_norm(outputs.embedding, dim=1, keepdim=True) * cosines


@config
class LargeMarginSoftmax(MarginLoss):
    """Softmax cross-entropy of a linear head's logits, with the true class's angle times `margin`.

    L-Softmax, Liu et al. 2016, arXiv 1612.02295, eq. 4: x . w = |x| |w| cos(theta) of the true class
    becomes |x| |w| psi(theta). The paper has no bias. Here the loss includes the head's bias like the
    logits do, so that their argmax is what is trained, and margin 1 is cross-entropy. `lambda_` is as
    with `SphereFace`; the authors' README advises 5 or 10 for difficult data and 0 for easy data.
    """

    head: ClassVar[HeadName | None] = "linear"
    margin: Count = 2  # factor on the angle of the true class
    lambda_: NonNegative = 5.0  # weight of the logit without margin, relative to that with

    def margin_logits(self, outputs: Outputs, labels: Tensor) -> Tensor:
        logits, embedding, class_weight = outputs
        true_weight = class_weight[labels]  # [B, D]
        lengths = [torch.linalg.vector_norm(x, dim=1) for x in (embedding, true_weight)]
        cosine = (F.normalize(embedding) * F.normalize(true_weight)).sum(1)
        change = lengths[0] * lengths[1] * (psi(cosine, self.margin) - cosine) / (1 + self.lambda_)
        true = logits.gather(1, labels[:, None])
        return logits.scatter(1, labels[:, None], true + change[:, None])
