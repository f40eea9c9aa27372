"""Losses of plain logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.config import Share, config


@config
class CrossEntropy(Loss):
    """Softmax cross-entropy of the logits; label smoothing as in Szegedy et al. 2016."""

    label_smoothing: Share = 0.0  # part of the target spread evenly over all classes

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
