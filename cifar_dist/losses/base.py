"""Floor 2. What every loss is: knobs, a formula, and what it says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from cifar_dist.models.heads import HeadName, Outputs
from cifar_dist.utils.config import NonNegative, config


@config
class Loss(ABC):
    """Outputs and labels in, one number a sample out. A loss names those of these that differ for it."""

    head: ClassVar[HeadName | None] = None  # the head it needs; None: any
    needs_teacher: ClassVar[bool] = False  # whether it needs a teacher
    trains_classifier: ClassVar[bool] = (
        True  # or else it stands beside one from which the logits learn
    )
    # Whether share * loss(labels) + (1 - share) * loss(partner_labels) is the loss of a mixed picture.
    # It is the definition with hard labels, and the loss of the mixed target where the loss is linear
    # in it; it says nothing where samples are compared by whether their labels agree.
    supports_mixup: ClassVar[bool] = True

    weight: NonNegative = 1.0

    @abstractmethod
    def __call__(
        self, outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None = None
    ) -> Tensor:
        """labels int64 [B], guide f32 [B, C] -> float32 [B], not yet multiplied by `weight`."""

    def weight_at(self, epoch: int) -> float:
        """Its weight in an epoch, counted from 0."""
        return self.weight
