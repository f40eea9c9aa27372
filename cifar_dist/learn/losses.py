"""Floor 2. A loss is its knobs and its formula: outputs and labels in, one number a sample out.

The objective multiplies by `weight` and adds up; no loss here does. A loss that is `taught` compares
the outputs with `guide`, the teacher's logits; the objective has multiplied both by their scale, and
lets the loss's weight rise over its first `warmup_epochs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.config import NonNegative, Share, config
from cifar_dist.learn.distill_losses import DecoupledDistill, Dist, Distill, LogitMse, MarginDistill
from cifar_dist.learn.margin_losses import ArcFace, CosFace, LargeMarginSoftmax, SphereFace
from cifar_dist.learn.metric_losses import Contrastive, SupCon, Triplet
from cifar_dist.nets.heads import HeadName, Outputs


class Loss(Protocol):
    """What the objective needs of a loss."""

    head: ClassVar[HeadName | None]  # the head it needs; None: any
    taught: ClassVar[bool]  # whether it needs a teacher
    classifies: ClassVar[
        bool
    ]  # whether the logits learn from it; else it stands beside one that does
    # Whether share * loss(labels) + (1 - share) * loss(partner_labels) is the loss of a mixed picture.
    # It is the definition with hard labels, and the loss of the mixed target where the loss is linear
    # in it; it says nothing where samples are compared by whether their labels agree.
    mixes: ClassVar[bool]

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

    head: ClassVar[HeadName | None] = None
    taught: ClassVar[bool] = False
    classifies: ClassVar[bool] = True
    mixes: ClassVar[bool] = True
    warmup_epochs: ClassVar[int] = 0
    weight: NonNegative = 1.0
    label_smoothing: Share = 0.0

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
        smoothing = self.label_smoothing
        return F.cross_entropy(
            outputs.logits.float(), labels, reduction="none", label_smoothing=smoothing
        )


@config
class BinaryCrossEntropy:
    """A yes or no for each class, sigmoid cross-entropy with the one-hot label, summed over classes.

    Wightman et al. 2021, arXiv 2110.00476. They take the mean over the classes, which is
    weight = 1 / C here; by the sum, the slope of each logit is probability - target as with
    softmax, so that learning rates and weights carry over. Smoothing is theirs and `CrossEntropy`'s:
    1 - s + s / C for the true class, s / C for the others. For a mixed picture the target is the
    mean of its two labels by their shares (their variant with 1 for both is not offered).
    An evaluation's `loss` is still that of a softmax.
    """

    head: ClassVar[HeadName | None] = None
    taught: ClassVar[bool] = False
    classifies: ClassVar[bool] = True
    mixes: ClassVar[bool] = True
    warmup_epochs: ClassVar[int] = 0
    weight: NonNegative = 1.0
    label_smoothing: Share = 0.0

    def __call__(self, outputs: Outputs, labels: Tensor, guide: Tensor | None = None) -> Tensor:
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
