"""Losses of plain logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.config import Share, config


@config
class CrossEntropy(Loss):
    """Softmax cross-entropy of the logits; label smoothing as in Szegedy et al. 2016.

    `class_weights: balanced` multiplies each sample's loss by the weight of its label (see
    `balanced_weights`). Without label smoothing this is `weight=` of `F.cross_entropy`, which with
    smoothing weighs the terms of the other classes as well.
    """

    label_smoothing: Share = 0.0  # part of the target spread evenly over all classes
    # balanced: weigh samples by the inverse frequency of their class in the training rows, with mean 1;
    # null: all equally
    class_weights: Literal["balanced"] | None = None

    @property
    def balances_classes(self) -> bool:
        return self.class_weights == "balanced"

    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        smoothing = self.label_smoothing
        return F.cross_entropy(outputs.logits, labels, reduction="none", label_smoothing=smoothing)


@config
class BinaryCrossEntropy(Loss):
    """Sigmoid cross-entropy with the one-hot label, summed over the classes.

    Wightman et al. 2021, arXiv 2110.00476. They average over the classes, which is weight = 1 / C
    here; with the sum, the gradient of each logit is probability - target as with softmax, so that
    learning rates and weights carry over. Label smoothing is as in their code and `CrossEntropy`:
    1 - s + s / C for the true class, s / C for the others. The target of a mixed image is the mean of
    its two labels weighted by `lam`; their variant with 1 for both is not implemented.
    The `loss` of an evaluation is still softmax cross-entropy.
    """

    label_smoothing: Share = 0.0  # part of the target spread evenly over all classes

    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits = outputs.logits
        low = self.label_smoothing / logits.shape[1]
        high = 1 - self.label_smoothing + low
        targets = torch.full_like(logits, low).scatter(1, labels[:, None], high)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return a weight for each class, f32 [C], given the labels of all training rows, int64 [N].

    Weight c is N / (K * n_c), with n_c rows of class c and K classes that have rows: inversely
    proportional to the frequency, with mean 1 over the rows. These are the weights "balanced" of
    scikit-learn. A class without rows has weight 0.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = len(labels) / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 0.0).float()
