"""View -> Terms: what the step differentiates and what it reports, one number a sample."""

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
from cifar_dist.losses.classification import logit_scale
from cifar_dist.models.heads import Outputs

Terms = dict[str, Tensor]  # each f32 [B]; "loss" is the weighted sum


class LossInputs(NamedTuple):
    """What the losses of one micro-batch are computed from, besides the model."""

    batch: AugmentedBatch
    teacher_logits: Tensor | None  # f32 [B, C]
    epoch: int


class Objective:
    """The weighted sum of the recipe's losses on the augmented batch.

    Losses that are taught compare logits, not cosines: a student's cosines are multiplied by the
    scale that its other losses give them, as an evaluation does.
    """

    def __init__(
        self, augment: Augment, losses: Mapping[str, Loss], teacher: Teacher | None = None
    ) -> None:
        self.augment = augment
        self.losses = dict(losses)
        self.teacher = teacher
        self.logit_scale = logit_scale(losses.values())

    @property
    def names(self) -> list[str]:
        """The terms that a call returns, in their order."""
        return [*self.losses, "loss", "top1"]

    def weights(self, epoch: int) -> tuple[float, ...]:
        """What each loss counts in an epoch, counted from 0."""
        return tuple(loss.weight_at(epoch) for loss in self.losses.values())

    def __call__(self, model: Callable[[Tensor], Outputs], batch: Batch) -> Terms:
        (view,) = self.augment_batches([batch])
        return self.compute_losses(model, self.prepare_inputs(view, batch))

    def augment_batches(self, batches: Sequence[Batch]) -> list[AugmentedBatch]:
        """Augment the micro-batches of a rank's step together, with the kernels of one of them."""
        view = self.augment(concatenate(batches))
        ends = list(accumulate(len(batch.rows) for batch in batches))
        return [view[start:end] for start, end in pairwise([0, *ends])]

    def prepare_inputs(self, view: AugmentedBatch, batch: Batch) -> LossInputs:
        """Run the teacher, if there is one, on a micro-batch."""
        teacher_logits = self.teacher(view, batch) if self.teacher else None  # f32 [B, C]
        return LossInputs(view, teacher_logits, batch.epoch)

    def compute_losses(self, model: Callable[[Tensor], Outputs], inputs: LossInputs) -> Terms:
        """Return the terms of the model's outputs on a micro-batch."""
        view, teacher_logits, epoch = inputs
        outputs = model(view.images)
        scaled = (
            outputs._replace(logits=outputs.logits * self.logit_scale)
            if teacher_logits is not None
            else outputs
        )
        terms = {}
        for name, loss in self.losses.items():
            compared = scaled if loss.needs_teacher else outputs
            terms[name] = mixup_weighted(
                view, partial(loss, compared, teacher_logits=teacher_logits)
            )
        weights = self.weights(epoch)
        weighted = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
        terms["loss"] = reduce(add, weighted)
        found = outputs.logits.detach().argmax(1)
        terms["top1"] = 100.0 * mixup_weighted(
            view, lambda labels: (found == labels).float()
        )  # percent
        return terms


def sum_terms(terms: Terms) -> Tensor:
    """Return each term's sum over the samples, detached, f32 [terms], in their order."""
    return torch.stack([term.detach() for term in terms.values()]).sum(1)


def mixup_weighted(view: AugmentedBatch, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What `of` says of the labels, f32 [B]; of mixed pictures, its mean over both labels by share."""
    own = of(view.labels)
    if view.lam is None or view.partner_labels is None:
        return own
    return view.lam * own + (1 - view.lam) * of(view.partner_labels)
