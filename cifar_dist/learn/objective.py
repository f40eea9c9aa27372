"""View -> Terms: what the step differentiates and what it reports, one number a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import NamedTuple

from torch import Tensor

from cifar_dist.data.augment import Augment, View
from cifar_dist.data.batches import Batch
from cifar_dist.learn.loss import Loss
from cifar_dist.learn.losses import logit_scale
from cifar_dist.learn.teacher import Teacher
from cifar_dist.nets.heads import Outputs

Terms = dict[str, Tensor]  # each f32 [B]; "loss" is the weighted sum


class Shown(NamedTuple):
    """What a model is shown of a batch, and what its teacher says of that."""

    view: View
    guide: Tensor | None  # f32 [B, C]
    epoch: int

    def tensors(self) -> list[Tensor]:
        """All that the terms are computed from, in one order."""
        view = self.view
        every = (view.images, view.labels, view.partner_labels, view.share, self.guide)
        return [tensor for tensor in every if tensor is not None]

    def copy(self) -> Shown:
        """The same in memory of its own."""
        tensors = {name: t.clone() for name, t in vars(self.view).items() if t is not None}
        guide = None if self.guide is None else self.guide.clone()
        return Shown(replace(self.view, **tensors), guide, self.epoch)


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
        return tuple(loss.weight_in(epoch) for loss in self.losses.values())

    def __call__(self, model: Callable[[Tensor], Outputs], batch: Batch) -> Terms:
        return self.judge(model, self.show(batch))

    def show(self, batch: Batch) -> Shown:
        """What does not depend on the model; asks the teacher, so once a batch."""
        view = self.augment(batch)
        guide = self.teacher(view, batch) if self.teacher else None  # f32 [B, C]
        return Shown(view, guide, batch.epoch)

    def judge(self, model: Callable[[Tensor], Outputs], shown: Shown) -> Terms:
        """The terms of the model's outputs on what it is shown."""
        view, guide, epoch = shown
        outputs = model(view.images)
        scaled = (
            outputs._replace(logits=outputs.logits * self.logit_scale)
            if guide is not None
            else outputs
        )
        terms = {}
        for name, loss in self.losses.items():
            compared = scaled if loss.taught else outputs
            terms[name] = mixed(view, partial(loss, compared, guide=guide))
        weights = self.weights(epoch)
        weighted = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
        terms["loss"] = reduce(add, weighted)
        found = outputs.logits.detach().argmax(1)
        terms["top1"] = 100.0 * mixed(view, lambda labels: (found == labels).float())  # percent
        return terms


def mixed(view: View, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What `of` says of the labels, f32 [B]; of mixed pictures, its mean over both labels by share."""
    own = of(view.labels)
    if view.share is None or view.partner_labels is None:
        return own
    return view.share * own + (1 - view.share) * of(view.partner_labels)
