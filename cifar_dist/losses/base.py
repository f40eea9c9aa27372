"""The base class of all losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import NonNegative, config


@config
class Loss(ABC):
    """Maps outputs and labels to one value per sample; subclasses override the class variables."""

    head: ClassVar[HeadName | None] = None  # the head it needs; None: any
    needs_teacher: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = True  # False: must be combined with a loss that does
    # Whether lam * loss(labels) + (1 - lam) * loss(partner_labels) is the loss of a mixed image. For a
    # loss that is linear in the target it is the loss of the mixed target. It is meaningless for a
    # loss that compares samples by whether their labels agree.
    supports_mixup: ClassVar[bool] = True

    weight: NonNegative = 1.0  # factor of this loss in the sum of all losses

    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each sample, float32 [B], not multiplied by `weight`.

        `labels` is int64 [B], `teacher_logits` float [B, C]. Computed in float32 without autocast.
        """
        with torch.autocast(labels.device.type, enabled=False):
            if teacher_logits is not None:
                teacher_logits = teacher_logits.float()
            outputs = Outputs(*(part.float() for part in outputs))
            return self.per_sample(outputs, labels, teacher_logits)

    @abstractmethod
    def per_sample(self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Return the loss of each sample, [B], from float32 arguments with autocast disabled."""

    @property
    def balances_classes(self) -> bool:
        """Whether each sample's loss is multiplied by the weight of its class (`balanced_weights`)."""
        return False

    def weight_at(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 0."""
        return self.weight
