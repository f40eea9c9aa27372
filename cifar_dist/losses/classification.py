"""Floor 2. The losses that a recipe may name; here those of plain logits.

The objective multiplies by `weight` and adds up; no loss does. A loss that is `taught` compares the
outputs with `guide`, the teacher's logits; the objective has multiplied both by their scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.losses.base import Loss
from cifar_dist.losses.distillation import DecoupledDistill, Dist, Distill, LogitMse, MarginDistill
from cifar_dist.losses.margin import ArcFace, CosFace, LargeMarginSoftmax, SphereFace
from cifar_dist.losses.metric import Contrastive, SupCon, Triplet
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.config import Share, config


@config
class CrossEntropy(Loss):
    """Softmax cross-entropy of the logits; with label smoothing as in Szegedy et al. 2016."""

    label_smoothing: Share = 0.0

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        smoothing = self.label_smoothing
        return F.cross_entropy(
            outputs.logits.float(), labels, reduction="none", label_smoothing=smoothing
        )


@config
class BinaryCrossEntropy(Loss):
    """A yes or no for each class, sigmoid cross-entropy with the one-hot label, summed over classes.

    Wightman et al. 2021, arXiv 2110.00476. They take the mean over the classes, which is
    weight = 1 / C here; by the sum, the slope of each logit is probability - target as with
    softmax, so that learning rates and weights carry over. Smoothing is theirs and `CrossEntropy`'s:
    1 - s + s / C for the true class, s / C for the others. For a mixed picture the target is the
    mean of its two labels by their shares (their variant with 1 for both is not offered).
    An evaluation's `loss` is still that of a softmax.
    """

    label_smoothing: Share = 0.0

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            logits = outputs.logits.float()
            low = self.label_smoothing / logits.shape[1]
            high = 1 - self.label_smoothing + low
            targets = torch.full_like(logits, low).scatter(1, labels[:, None], high)
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "bce": BinaryCrossEntropy,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "l_softmax": LargeMarginSoftmax,
    "triplet": Triplet,
    "contrastive": Contrastive,
    "supcon": SupCon,
    "distill": Distill,
    "margin_distill": MarginDistill,
    "dkd": DecoupledDistill,
    "dist": Dist,
    "logit_mse": LogitMse,
}


def logit_scale(losses: Iterable[Loss]) -> float:
    """What makes a softmax of cosines mean something: the largest `scale` among the losses, or 1."""
    scales = [loss.scale for loss in losses if hasattr(loss, "scale")]
    return max((scale for scale in scales if scale is not None), default=1.0)
