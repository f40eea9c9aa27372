"""Compute the terms of an augmented micro-batch: the recipe's losses, their weighted sum, and top-1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentedBatch
from cifar_dist.data.batches import Batch, concatenate
from cifar_dist.distill.teacher import Teacher
from cifar_dist.losses.base import Loss
from cifar_dist.losses.registry import logit_scale
from cifar_dist.models.heads import Outputs

Terms = dict[str, Tensor]  # each f32 [B]; "loss" is the weighted sum


class LossInputs(NamedTuple):
    """What the losses of a micro-batch are computed from, besides the model."""

    batch: AugmentedBatch
    teacher_logits: Tensor | None  # f32 [B, C]
    epoch: int


class Objective:
    """The weighted sum of the recipe's losses.

    Distillation losses compare logits, not cosines: the cosines of a student are multiplied by the
    scale of its other losses first, as in an evaluation. `class_weights`, f32 [C], multiply those losses
    that balance the classes.
    """

    def __init__(
        self,
        augment: Augment,
        losses: Mapping[str, Loss],
        teacher: Teacher | None = None,
        *,
        class_weights: Tensor | None = None,
    ) -> None:
        self.augment = augment
        self.losses = dict(losses)
        self.teacher = teacher
        self.class_weights = class_weights  # CUDA graphs read its memory
        self.logit_scale = logit_scale(losses.values())

    @property
    def names(self) -> list[str]:
        """Names of the terms, in the order in which a call returns them."""
        return [*self.losses, "loss", "top1"]

    def weights(self, epoch: int) -> tuple[float, ...]:
        """Return the weight of each loss in an epoch, counted from 0."""
        return tuple(loss.weight_at(epoch) for loss in self.losses.values())

    def __call__(self, model: Callable[[Tensor], Outputs], batch: Batch) -> Terms:
        (augmented,) = self.augment_batches([batch])
        return self.compute_losses(model, self.prepare_inputs(augmented, batch))

    def augment_batches(self, batches: Sequence[Batch]) -> list[AugmentedBatch]:
        """Augment all micro-batches of a step at once: as many kernels as for one of them."""
        augmented = self.augment(concatenate(batches))
        ends = list(accumulate(len(batch.rows) for batch in batches))
        return [augmented[start:end] for start, end in pairwise([0, *ends])]

    def prepare_inputs(self, augmented: AugmentedBatch, batch: Batch) -> LossInputs:
        """Run the teacher, if there is one."""
        teacher_logits = self.teacher(augmented, batch) if self.teacher else None
        return LossInputs(augmented, teacher_logits, batch.epoch)

    def compute_losses(self, model: Callable[[Tensor], Outputs], inputs: LossInputs) -> Terms:
        """Return the terms of the model's outputs; top1 in percent."""
        batch, teacher_logits, epoch = inputs
        outputs = model(batch.images)
        scaled = outputs
        if teacher_logits is not None:
            scaled = outputs._replace(logits=outputs.logits * self.logit_scale)
        terms = {}
        for name, loss in self.losses.items():
            loss_outputs = scaled if loss.needs_teacher else outputs
            loss_of = partial(loss, loss_outputs, teacher_logits=teacher_logits)
            if loss.balances_classes:
                loss_of = partial(self.class_weighted, loss_of)
            terms[name] = mixup_weighted(batch, loss_of)
        weights = self.weights(epoch)
        weighted = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
        terms["loss"] = reduce(add, weighted)
        predicted = outputs.logits.detach().argmax(1)
        terms["top1"] = 100.0 * mixup_weighted(batch, lambda labels: (predicted == labels).float())
        return terms

    def class_weighted(self, loss_of: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        """Return `loss_of(labels)`, f32 [B], times the weight of each label's class."""
        assert self.class_weights is not None
        return self.class_weights.index_select(0, labels) * loss_of(labels)


def sum_terms(terms: Terms) -> Tensor:
    """Return each term's sum over the samples, detached, f32 [terms], in their order."""
    return torch.stack([term.detach() for term in terms.values()]).sum(1)


def mixup_weighted(batch: AugmentedBatch, term: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `term(labels)`, f32 [B]; for mixed images the mean over both labels, weighted by lam."""
    result = term(batch.labels)
    if batch.lam is None or batch.partner_labels is None:
        return result
    return batch.lam * result + (1 - batch.lam) * term(batch.partner_labels)
