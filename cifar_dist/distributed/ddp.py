"""DDP and the collectives of tensors."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from cifar_dist.distributed.context import DistContext

GradReduceDtype = Literal["fp32", "bf16"]  # in which ranks send each other gradients


def wrap_ddp(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    micro_batches: int,
    grad_reduce_dtype: GradReduceDtype = "fp32",
) -> nn.Module:
    """The model under DDP, or itself where there is one process; call it anew when other parameters learn.

    Accelerate lets go of an earlier one here, and with it of its hooks and its buckets of gradients.
    The graph is static only where each rank runs one micro-batch: together with `no_sync` a static graph
    crashes on the first backward or stops reducing.
    """
    accelerator.free_memory()
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.static_graph = micro_batches == accelerator.num_processes
    with warnings.catch_warnings():  # torch renames broadcast_buffers; Accelerate has the old name
        warnings.filterwarnings("ignore", category=FutureWarning)
        wrapped = accelerator.prepare_model(model)
    if grad_reduce_dtype == "bf16" and accelerator.num_processes > 1:
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped


def all_reduce_gradients(flat: Tensor, world_size: int, *, dtype: GradReduceDtype) -> None:
    """Make f32 gradients, in place, their mean over all ranks, as DDP does: divided, then added up."""
    sent = flat.bfloat16() if dtype == "bf16" else flat
    dist.all_reduce(sent.div_(world_size))
    if sent is not flat:
        flat.copy_(sent)


def broadcast_buffers(model: nn.Module, context: DistContext) -> None:
    """Give all ranks rank 0's buffers (BatchNorm's running statistics are micro-batch 0's)."""
    if context.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_weights(model: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers, as DDP does when it is made; all call it together."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)


def gather_blocks(local: Tensor, context: DistContext) -> Tensor:
    """[blocks, ...] of each rank, dealt block by block, back in one row: [blocks * W, ...]."""
    if context.world_size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(context.world_size)]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
