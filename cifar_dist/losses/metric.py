"""Floor 2. Losses that compare the samples of a micro-batch: near where the labels agree, far where not.

They shape the embedding, the classifier learns nothing from them, so they stand beside a loss that
teaches it. Each row of the micro-batch is an anchor in turn, and its partners are the other rows: the
micro-batch, not the global batch, is what they see, hence `run.micro_batches` is part of the mathematics, as it is
with BatchNorm. Element [i] of a result is what row i is charged as an anchor. An anchor for which
the micro-batch has no other row of its class is charged 0 and still counts as a row: nothing is divided by
how many anchors have partners, so a loss grows with the micro-batch. Of 100 equally frequent classes,
21 % of the anchors have one among 25 rows, 71 % among 125, and 98 % among 400.

Computed in float32 with autocast disabled. A distance of 0 has the gradient 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.config import NonNegative, Positive, config


def positive_negative_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B] -> bool [B, B], [B, B]: which other rows have anchor i's label, which have not."""
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


def l2_normalize(embedding: Tensor) -> Tensor:
    """[B, D] -> [B, D] of length 1; a row of zeros has no direction and stays, with a tame slope."""
    return F.normalize(embedding, eps=1e-3)


def squared_distances(embedding: Tensor) -> Tensor:
    """[B, D] -> [B, B], by one product of matrices; never negative."""
    squares = embedding.square().sum(1)
    return (squares[:, None] + squares - 2 * embedding @ embedding.T).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each line's chosen values, [B, B] -> [B]; 0 where none is chosen."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


@config
class PairLoss(Loss):
    """A loss of this file: it needs another one beside it, and pictures of one label each."""

    trains_classifier: ClassVar[bool] = False
    supports_mixup: ClassVar[bool] = False


@config
class Triplet(PairLoss):
    """An anchor's farthest partner of its class should be `margin` nearer than any other class.

    Hermans et al. 2017, arXiv 1703.07737, eq. 5, "batch hard": max(0, margin + d(farthest of its
    class) - d(nearest of another)), Euclidean distances, not squared. `margin: null` is their soft
    margin, log(1 + exp(difference)). An anchor needs both partners, or is charged 0.

    `normalize` compares directions, so that distances are 0 to 2 and margins mean the same with any
    head (Schroff et al. 2015, arXiv 1503.03832, whose margin is 0.2); the paper does not.
    """

    margin: NonNegative | None = 0.2
    normalize: bool = True

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            return self.per_anchor(outputs.embedding.float(), labels)

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """Embedding [B, D] -> [B]."""
        if self.normalize:
            embedding = l2_normalize(embedding)
        same, other = positive_negative_masks(labels)
        with torch.no_grad():
            distances = squared_distances(embedding)
            farthest = distances.masked_fill(~same, -1).argmax(1)  # [B]
            nearest = distances.masked_fill(~other, torch.inf).argmin(1)
        pull, push = (  # of the chosen pairs alone, exactly; the slope of this norm at 0 is 0
            torch.linalg.vector_norm(embedding - embedding[chosen], dim=1)
            for chosen in (farthest, nearest)
        )
        difference = pull - push
        charged = (
            F.softplus(difference) if self.margin is None else F.relu(difference + self.margin)
        )
        return charged.masked_fill(~(same.any(1) & other.any(1)), 0.0)


@config
class Contrastive(PairLoss):
    """Half the squared distance to its class, half the squared lack of `margin` to other classes.

    Hadsell et al. 2006 (Dimensionality Reduction by Learning an Invariant Mapping, CVPR), eq. 4: a
    pair of one class costs d^2 / 2, of two classes max(0, margin - d)^2 / 2. An anchor is charged the
    mean over its partners of its class plus the mean over all others: with 100 classes the second are
    a hundred times as many, and a mean over both would forget the first. `normalize` as with
    `Triplet`; the paper does not.
    """

    margin: Positive = 1.0
    normalize: bool = True

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            return self.per_anchor(outputs.embedding.float(), labels)

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """Embedding [B, D] -> [B]."""
        if self.normalize:
            embedding = l2_normalize(embedding)
        same, other = positive_negative_masks(labels)
        squares = squared_distances(embedding)
        distances = squares.clamp(min=1e-12).sqrt()  # the slope of the root is infinite at 0
        pull = masked_mean(squares / 2, same)
        push = masked_mean(F.relu(self.margin - distances).square() / 2, other)
        return (pull + push).masked_fill(~same.any(1), 0.0)


@config
class SupCon(PairLoss):
    """How surprising the anchor's class is among all other rows, by a softmax of cosines.

    Khosla et al. 2020, arXiv 2004.11362, eq. 2 (L_out): minus the mean over the partners p of the
    anchor's class of log(exp(cos(i, p) / temperature) / sum over all other rows a of
    exp(cos(i, a) / temperature)). 0.1 is the paper's temperature. There a batch has two views of
    each picture and hence a partner for every anchor; here it has one view, so take large micro-batches.
    """

    temperature: Positive = 0.1

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            return self.per_anchor(outputs.embedding.float(), labels)

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """Embedding [B, D] -> [B]."""
        embedding = l2_normalize(embedding)
        same, other = positive_negative_masks(labels)
        cosines = embedding @ embedding.T / self.temperature
        lowest = torch.finfo(cosines.dtype).min / 4  # -inf would be NaN in a micro-batch of one row
        others = cosines.masked_fill(~(same | other), lowest)
        return masked_mean(others.logsumexp(1, keepdim=True) - cosines, same)
