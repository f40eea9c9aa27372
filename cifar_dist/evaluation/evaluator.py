"""Exact evaluation: fixed blocks of rows, each dealt whole to one rank, the same bits in any world."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import epoch_order, eval_blocks
from cifar_dist.data.dataset import Split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.ddp import broadcast_buffers, gather_blocks
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.log import progress_bar
from cifar_dist.utils.precision import Precision, autocast

BLOCK_SIZE = 250  # rows; part of the result's identity, so a constant
SMALL_BLOCK_SIZE, SMALL = 1000, 64  # up to so many pixels a side, where a GPU waits for launches


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    metrics: dict[str, float]  # loss, top1 and top5 in percent
    logits: Tensor  # f32 [N, C] on the CPU, in the order of the rows, times the recipe's scale
    labels: Tensor  # int64 [N] on the CPU


class FlipTTA(nn.Module):
    """A model that looks at each picture and at its mirror image, and gives the mean logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Outputs:
        plain, mirrored = self.model(images), self.model(images.flip(3))
        return plain._replace(logits=(plain.logits + mirrored.logits) / 2)


@torch.no_grad()
def update_bn(
    model: nn.Module,
    augment: Augment,
    split: Split,
    rows: Tensor,
    *,
    seed: int,
    epoch: int,
    precision: Precision,
    context: DistContext,
    frozen: Collection[str] = (),
) -> None:
    """Give BatchNorm the statistics of these very weights: means over blocks of an epoch's pictures.

    As Izmailov et al. 2018 do for an average, whose statistics no training has seen. Blocks are
    shuffled rows as that epoch shows them, the last partial one left out, and nothing is dropped.
    A norm all of whose parameters are `frozen`, by name, keeps those that the others learnt behind.
    The same bits at any world size.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        if not module.affine or not {f"{name}.weight", f"{name}.bias"}.issubset(frozen)
    ]
    if not norms:
        return
    device = split.labels.device
    kept = [(module.training, module.momentum) for module in norms]
    for module in norms:
        module.train()
        module.momentum = 1.0  # what is left behind is the block's own
    size = min(BLOCK_SIZE, len(rows))
    blocks = len(rows) // size
    order = epoch_order(rows, seed=seed, epoch=epoch, shuffle=True)[: blocks * size]
    statistics: list[Any] = [
        buffer for module in norms for buffer in (module.running_mean, module.running_var)
    ]
    widths = [len(buffer) for buffer in statistics]
    seen = torch.zeros(-(-blocks // context.world_size), sum(widths), device=device)
    dealt = eval_blocks(
        split, order, block_size=size, rank=context.rank, world_size=context.world_size
    )
    for place, batch in enumerate(dealt):
        with autocast(precision, device):
            model(augment(replace(batch, epoch=epoch)).images)
        seen[place] = torch.cat(statistics)
        context.heartbeat.beat()
    means = gather_blocks(seen, context).flatten(0, -2)[:blocks].mean(0)
    for buffer, mean in zip(statistics, means.split(widths), strict=True):
        buffer.copy_(mean)
    for module, (training, momentum) in zip(norms, kept, strict=True):
        module.train(training)
        module.momentum = momentum
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(blocks)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    rows: Tensor,
    *,
    precision: Precision,
    logit_scale: float,
    context: DistContext,
    show_progress: bool = False,
) -> EvalResult:
    """Run the bare model (no DDP) over `rows` (int64, ascending); all ranks get the same result.

    `logit_scale` is what the loss multiplies cosines with; without it their softmax says nothing.
    `shown`: with a progress bar of its own.
    """
    device = split.labels.device
    broadcast_buffers(model, context)
    was_training = [
        (module, module.training) for module in model.modules()
    ]  # not all: frozen norms
    model.eval()
    size = block_size(model)
    blocks = -(-len(rows) // size)
    mine = -(-blocks // context.world_size)  # as many places on each rank; the last may stay empty
    logits: Tensor | None = None
    bar = progress_bar(0, mine, shown=show_progress and context.is_main, unit="block")
    for place, batch in enumerate(
        eval_blocks(split, rows, block_size=size, rank=context.rank, world_size=context.world_size)
    ):
        with autocast(precision, device):
            outputs = model(batch.images)
        if logits is None:
            logits = torch.zeros(mine, size, outputs.logits.shape[1], device=device)
        logits[place, : len(batch.rows)] = outputs.logits.float() * logit_scale
        context.heartbeat.beat()
        bar.update()
    bar.close()
    for module, training in was_training:
        module.training = training
    classes = context.all_reduce_max([0.0 if logits is None else float(logits.shape[2])])[0]
    if logits is None:  # fewer blocks than ranks
        logits = torch.zeros(mine, size, int(classes), device=device)
    gathered = gather_blocks(logits, context).flatten(0, 1)[: len(rows)]
    labels = split.labels.index_select(0, rows.to(device))
    metrics = classification_metrics(gathered, labels)
    return EvalResult(metrics=metrics, logits=gathered.cpu(), labels=labels.cpu())


def block_size(model: nn.Module) -> int:
    """How many rows an evaluation gives this model at once."""
    image_size = getattr(getattr(model, "pixels", None), "image_size", SMALL + 1)
    return SMALL_BLOCK_SIZE if image_size <= SMALL else BLOCK_SIZE
