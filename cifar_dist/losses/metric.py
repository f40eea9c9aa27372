"""Losses that pull embeddings of one class together and push other classes apart.

They train the embedding but not the classifier, so they are combined with a loss that does. Each row
of the micro-batch is an anchor once and is compared with the other rows of the micro-batch, not of
the global batch, so `run.micro_batches` affects the result, as it does with BatchNorm. Element [i]
of a result is the loss of row i as an anchor. It is 0 for an anchor without a positive (another row
of its class), which still counts as a row: nothing is divided by the number of anchors with
positives. With 100 equally frequent classes, 21 % of the anchors have a positive among 25 rows,
71 % among 125, and 98 % among 400.

The gradient of a distance of 0 is 0.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.config import NonNegative, Positive, config


def positive_negative_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows are positives and which are negatives of each anchor: int64 [B] -> bool [B, B].

    A row is not its own positive.
    """
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


def l2_normalize(embedding: Tensor) -> Tensor:
    """Return rows of length 1, [B, D]; rows shorter than 1e-3 stay shorter, with finite gradients."""
    return F.normalize(embedding, eps=1e-3)


def squared_distances(embedding: Tensor) -> Tensor:
    """Return all squared distances, [B, D] -> [B, B], by one matrix product; never negative."""
    squares = embedding.square().sum(1)
    return (squares[:, None] + squares - 2 * embedding @ embedding.T).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row's selected values, [B, B] -> [B]; 0 if none is selected."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


@config
class PairLoss(Loss):
    """Base class: a loss that compares rows by label, without a gradient for the classifier."""

    trains_classifier: ClassVar[bool] = False
    supports_mixup: ClassVar[bool] = False

    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        return self.per_anchor(outputs.embedding, labels)

    @abstractmethod
    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each anchor, [B], from embeddings [B, D]."""


@config
class Triplet(PairLoss):
    """The farthest positive should be `margin` nearer than the nearest negative.

    Hermans et al. 2017, arXiv 1703.07737, eq. 5, "batch hard": max(0, margin + d(farthest positive) -
    d(nearest negative)), with Euclidean distances, not squared. `margin: null` is their soft margin,
    log(1 + exp(difference)). The loss is 0 for an anchor without a positive or without a negative.

    `normalize` compares directions, so that distances are 0 to 2 and a margin means the same with any
    head (Schroff et al. 2015, arXiv 1503.03832, whose margin is 0.2); the paper does not.
    """

    # how much nearer the positive should be; null: the soft margin log(1 + exp(difference))
    margin: NonNegative | None = 0.2
    normalize: bool = True  # compare embeddings of length 1

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        if self.normalize:
            embedding = l2_normalize(embedding)
        positive, negative = positive_negative_masks(labels)
        with torch.no_grad():
            distances = squared_distances(embedding)
            farthest = distances.masked_fill(~positive, -1).argmax(1)  # [B]
            nearest = distances.masked_fill(~negative, torch.inf).argmin(1)
        pull, push = (  # exact distances, of the selected pairs only; the gradient at 0 is 0
            torch.linalg.vector_norm(embedding - embedding[rows], dim=1)
            for rows in (farthest, nearest)
        )
        difference = pull - push
        loss = F.softplus(difference) if self.margin is None else F.relu(difference + self.margin)
        return loss.masked_fill(~(positive.any(1) & negative.any(1)), 0.0)


@config
class Contrastive(PairLoss):
    """Half the squared distance to positives, and half the squared shortfall of `margin` to negatives.

    Hadsell et al. 2006 (Dimensionality Reduction by Learning an Invariant Mapping, CVPR), eq. 4: a
    pair of one class costs d^2 / 2, of two classes max(0, margin - d)^2 / 2. The loss of an anchor is
    the mean over its positives plus the mean over its negatives: with 100 classes negatives are a
    hundred times as many and would dominate a common mean. `normalize` as with `Triplet`; the paper
    does not.
    """

    margin: Positive = 1.0  # distance beyond which a negative costs nothing
    normalize: bool = True  # compare embeddings of length 1

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        if self.normalize:
            embedding = l2_normalize(embedding)
        positive, negative = positive_negative_masks(labels)
        squares = squared_distances(embedding)
        distances = squares.clamp(min=1e-12).sqrt()  # the gradient of the root is infinite at 0
        pull = masked_mean(squares / 2, positive)
        push = masked_mean(F.relu(self.margin - distances).square() / 2, negative)
        return (pull + push).masked_fill(~positive.any(1), 0.0)


@config
class SupCon(PairLoss):
    """Cross-entropy of the anchor's positives under a softmax of cosines over all other rows.

    Khosla et al. 2020, arXiv 2004.11362, eq. 2 (L_out): minus the mean over the positives p of
    log(exp(cos(i, p) / temperature) / sum over all other rows a of exp(cos(i, a) / temperature)). 0.1
    is the paper's temperature. Their batch has two views of each image and thus a positive for every
    anchor; here it has one view, so use large micro-batches.
    """

    temperature: Positive = 0.1  # divisor of the cosines before the softmax

    def per_anchor(self, embedding: Tensor, labels: Tensor) -> Tensor:
        embedding = l2_normalize(embedding)
        positive, negative = positive_negative_masks(labels)
        cosines = embedding @ embedding.T / self.temperature
        lowest = torch.finfo(cosines.dtype).min / 4  # -inf would be NaN in a micro-batch of one row
        others = cosines.masked_fill(~(positive | negative), lowest)
        return masked_mean(others.logsumexp(1, keepdim=True) - cosines, positive)
