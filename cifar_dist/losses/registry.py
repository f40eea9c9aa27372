"""The losses that a recipe can name."""

from __future__ import annotations

from collections.abc import Iterable

from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import BinaryCrossEntropy, CrossEntropy
from cifar_dist.losses.distillation import (
    DecoupledDistill,
    Dist,
    Distill,
    LogitMse,
    MarginDistill,
    MultiLevel,
    TransformedTeacher,
)
from cifar_dist.losses.margin import ArcFace, CosFace, LargeMarginSoftmax, SphereFace
from cifar_dist.losses.metric import Contrastive, SupCon, Triplet

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
    "wttm": TransformedTeacher,
    "mlkd": MultiLevel,
    "logit_mse": LogitMse,
}


def logit_scale(losses: Iterable[Loss]) -> float:
    """Return the largest `scale` of the losses, or 1: a softmax of cosines needs such a factor."""
    scales = [loss.scale for loss in losses if hasattr(loss, "scale")]
    return max((scale for scale in scales if scale is not None), default=1.0)
