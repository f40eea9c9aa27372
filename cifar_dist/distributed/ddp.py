"""DDP, and collectives of tensors."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.tree_sum import GradReduceDtype


def wrap_ddp(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    micro_batches: int,
    grad_reduce_dtype: GradReduceDtype = "fp32",
) -> nn.Module:
    """Return the model under DDP, or the model itself for a single process.

    Replaces the accelerator's options of DDP, so that any Accelerator trains alike. Call it again
    when other parameters become trainable: `free_memory` releases the hooks and gradient buckets of
    the earlier wrapper. The graph is static only if each rank runs one
    micro-batch, since with `no_sync` a static graph crashes in the first backward or stops reducing.
    """
    accelerator.free_memory()
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # broadcast before each evaluation instead
        gradient_as_bucket_view=True,
        static_graph=micro_batches == accelerator.num_processes,
    )
    with warnings.catch_warnings():  # Accelerate passes broadcast_buffers, which torch has renamed
        warnings.filterwarnings("ignore", category=FutureWarning)
        wrapped = accelerator.prepare_model(model)
    if grad_reduce_dtype == "bf16" and accelerator.num_processes > 1:
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped


def broadcast_buffers(model: nn.Module, context: DistContext) -> None:
    """Copy rank 0's buffers to all ranks: the BatchNorm statistics are those of micro-batch 0."""
    if context.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_weights(model: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)


def gather_blocks(local: Tensor, context: DistContext) -> Tensor:
    """Gather blocks that were dealt round-robin: [blocks, ...] per rank to [blocks * W, ...]."""
    if context.world_size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(context.world_size)]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
