"""Evaluate a model exactly: fixed blocks of rows give the same bits at any world size."""

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
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.ddp import broadcast_buffers, gather_blocks
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.models.heads import Outputs
from cifar_dist.utils.log import progress_bar
from cifar_dist.utils.precision import Precision, autocast

# The block size affects the last bits of the logits, so it is a constant. Small images use larger
# blocks because a GPU would otherwise wait for kernel launches.
BLOCK_SIZE, SMALL_IMAGE_BLOCK_SIZE = 250, 1000  # rows
SMALL_IMAGE_SIZE = 64  # pixels per side


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    metrics: dict[str, float]  # loss, top1 and top5 in percent
    logits: Tensor  # f32 [N, C] on the CPU, in row order, multiplied by the logit scale
    labels: Tensor  # int64 [N] on the CPU


class EvaluationStoppedError(Exception):
    """A stop signal arrived on some rank during an evaluation; raised on all ranks."""


class FlipTTA(nn.Module):
    """Test-time augmentation: average the logits of each image and its mirror image."""

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
    stoppable: bool = False,
) -> int:
    """Recompute BatchNorm running statistics for the current weights; return how many rows were used.

    Averaged weights need this because no training step saw them (Izmailov et al. 2018). The
    statistics are means over shuffled, augmented blocks of `epoch`, without dropout and without the
    last partial block. Layers whose parameters are all `frozen` (by name) keep their statistics.
    The result has the same bits at any world size. If `stoppable`, a stop signal raises
    EvaluationStoppedError and leaves the statistics as they were.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        if not module.affine or not {f"{name}.weight", f"{name}.bias"}.issubset(frozen)
    ]
    if not norms:
        return 0
    device = split.labels.device
    modes = [(module.training, module.momentum) for module in norms]
    for module in norms:
        module.train()
        module.momentum = 1.0  # keeps only the statistics of the current block
    size = min(BLOCK_SIZE, len(rows))
    num_blocks = len(rows) // size
    order = epoch_order(rows, seed=seed, epoch=epoch, shuffle=True)[: num_blocks * size]
    statistics: list[Any] = [
        buffer for module in norms for buffer in (module.running_mean, module.running_var)
    ]
    before = [buffer.clone() for buffer in statistics]
    widths = [len(buffer) for buffer in statistics]
    per_block = torch.zeros(-(-num_blocks // context.world_size), sum(widths), device=device)
    batches = eval_blocks(
        split, order, block_size=size, rank=context.rank, world_size=context.world_size
    )
    stopped = False
    for index, batch in enumerate(batches):
        if stopped := stoppable and signals.stop_signal() > 0:
            break
        with autocast(precision, device):
            model(augment(replace(batch, epoch=epoch)).images)
        per_block[index] = torch.cat(statistics)
        context.heartbeat.beat()
    for module, (training, momentum) in zip(norms, modes, strict=True):
        module.train(training)
        module.momentum = momentum
    (stopped_anywhere,) = context.all_reduce_max([stopped])
    if stopped_anywhere:
        torch._foreach_copy_(statistics, before)
        raise EvaluationStoppedError
    means = gather_blocks(per_block, context).flatten(0, -2)[:num_blocks].mean(0)
    torch._foreach_copy_(statistics, means.split(widths))
    for module in norms:
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(num_blocks)
    return len(order)


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
    stoppable: bool = False,
) -> EvalResult:
    """Evaluate the unwrapped model on `rows` (int64, ascending); all ranks get the same result.

    `logit_scale` is the factor that the loss applies to cosine logits: without it their softmax is
    nearly uniform. The training mode of each module is restored. If `stoppable`, a stop signal raises
    EvaluationStoppedError.
    """
    device = split.labels.device
    broadcast_buffers(model, context)
    # Per module, because frozen BatchNorm layers stay in evaluation mode during training.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    size = block_size(model)
    num_blocks = -(-len(rows) // size)
    blocks_per_rank = -(-num_blocks // context.world_size)
    logits: Tensor | None = None
    batches = eval_blocks(
        split, rows, block_size=size, rank=context.rank, world_size=context.world_size
    )
    bar = progress_bar(0, blocks_per_rank, enabled=show_progress and context.is_main, unit="block")
    stopped = False
    for index, batch in enumerate(batches):
        if stopped := stoppable and signals.stop_signal() > 0:
            break
        with autocast(precision, device):
            outputs = model(batch.images)
        if logits is None:
            logits = torch.zeros(blocks_per_rank, size, outputs.logits.shape[1], device=device)
        logits[index, : len(batch.rows)] = outputs.logits.float() * logit_scale
        context.heartbeat.beat()
        bar.update()
    bar.close()
    for module, training in modes:
        module.training = training
    num_classes, stopped_anywhere = context.all_reduce_max(
        [0 if logits is None else logits.shape[2], stopped]
    )
    if stopped_anywhere:
        raise EvaluationStoppedError
    if logits is None:  # this rank has no block
        logits = torch.zeros(blocks_per_rank, size, int(num_classes), device=device)
    gathered = gather_blocks(logits, context).flatten(0, 1)[: len(rows)]
    labels = split.labels.index_select(0, rows.to(device))
    metrics = classification_metrics(gathered, labels)
    return EvalResult(metrics=metrics, logits=gathered.cpu(), labels=labels.cpu())


def block_size(model: nn.Module) -> int:
    """Return the number of rows per evaluation block, which depends on the model's image size."""
    image_size = getattr(getattr(model, "preprocess", None), "image_size", SMALL_IMAGE_SIZE + 1)
    return SMALL_IMAGE_BLOCK_SIZE if image_size <= SMALL_IMAGE_SIZE else BLOCK_SIZE
