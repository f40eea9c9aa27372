"""View -> Terms: what the step differentiates and what it reports, one number a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cifar_dist.data.augment import Augment
from cifar_dist.data.batches import Batch
from cifar_dist.learn.losses import Loss
from cifar_dist.nets.heads import Outputs

Terms = dict[str, Tensor]  # each f32 [B]; "loss" is the weighted sum


class Objective:
    """The weighted sum of the recipe's losses on the augmented batch."""

    def __init__(self, augment: Augment, losses: Mapping[str, Loss]) -> None:
        self.augment = augment
        self.losses = dict(losses)

    @property
    def names(self) -> list[str]:
        """The terms that a call returns, in their order."""
        return [*self.losses, "loss", "top1"]

    def __call__(self, model: Callable[[Tensor], Outputs], batch: Batch) -> Terms:
        view = self.augment(batch)
        outputs = model(view.images)
        terms = {name: loss(outputs, view.labels) for name, loss in self.losses.items()}
        weighted = [loss.weight * terms[name] for name, loss in self.losses.items()]
        terms["loss"] = torch.stack(weighted).sum(0)
        terms["top1"] = 100.0 * (outputs.logits.detach().argmax(1) == view.labels)  # percent
        return terms
