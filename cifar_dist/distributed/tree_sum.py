"""Sum gradients in one binary tree over the micro-batches, whatever process computed them.

Floating-point addition is not associative, so the order of a sum decides its last bits. Node (first, stride)
of the tree is the sum of the micro-batches first, first + stride, first + 2 stride, ...: the only one of
them, or else node (first, 2 stride) plus node (first + stride, 2 stride). Rank r computes the micro-batches
r, r + W, r + 2 W, ..., which are node (r, W) if the number of ranks W is a power of two. Its own sum and the
sum over the ranks are then parts of the same tree for any such W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Reduction = Literal["exact", "ddp"]  # of the gradients of micro-batches and ranks
GradReduceDtype = Literal["fp32", "bf16"]  # of the gradients that ranks send


def is_exact(micro_batches: int, world_size: int) -> bool:
    """Return whether the ranks' sums are nodes of the tree, so that results have the same bits."""
    return world_size & (world_size - 1) == 0 or world_size == micro_batches


def tree_order(leaves: int) -> list[tuple[int, int]]:
    """Return all leaves, depth first, each with the number of additions that follow it.

    The sum is computed on a stack: push a leaf, then replace the two topmost values by their sum, once for
    each addition. The stack holds at most ceil(log2(leaves)) + 1 values.
    """
    order: list[tuple[int, int]] = []

    def visit(first: int, stride: int) -> None:
        if first + stride >= leaves:
            order.append((first, 0))
            return
        visit(first, 2 * stride)
        visit(first + stride, 2 * stride)
        leaf, additions = order[-1]
        order[-1] = (leaf, additions + 1)

    visit(0, 1)
    return order


def tree_depth(leaves: int) -> int:
    """Return how many values are on the stack at most."""
    return (leaves - 1).bit_length() + 1


def tree_sum(values: Sequence[list[Tensor]], *, in_place: bool = False) -> list[Tensor]:
    """Return the sum of lists of tensors in the order of the tree; `in_place` overwrites the lists."""
    stack: list[list[Tensor]] = []
    for index, additions in tree_order(len(values)):
        stack.append(values[index])
        for _ in range(additions):
            newer = stack.pop()
            if in_place:
                torch._foreach_add_(stack[-1], newer)
            else:
                stack[-1] = list(torch._foreach_add(stack[-1], newer))
    return stack[0]


class TreeAllReduce:
    """Sum gradients over the ranks in the order of the tree, in place.

    Each rank adds one shard of all ranks and sends the sum to all: as many bytes as in a ring. Its buffers
    have the size of (world_size - 1) / world_size of the gradients.
    """

    def __init__(self, world_size: int, *, dtype: GradReduceDtype) -> None:
        self.world_size, self.dtype = world_size, dtype
        self.received: dict[int, list[Tensor]] = {}  # by rank

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Replace f32 gradients by their sums. They must be dense and have equal strides on all ranks."""
        views = [gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients]
        sent = views
        if self.dtype == "bf16":
            sent = [view.bfloat16() for view in sent]
        # gloo exchanges only tensors of the host.
        if views[0].is_cuda and dist.get_backend() == "gloo":
            sent = [view.cpu() for view in sent]
        shards, rank = split_evenly(sent, self.world_size), dist.get_rank()
        others = [other for other in range(self.world_size) if other != rank]
        if not self.received:
            self.received = {
                other: [torch.empty_like(one) for one in shards[rank]] for other in others
            }
        exchange([(other, shards[other], self.received[other]) for other in others])
        values = [self.received.get(other, shards[rank]) for other in range(self.world_size)]
        if self.dtype == "bf16":
            values = [[tensor.float() for tensor in value] for value in values]
        total = tree_sum(values, in_place=True)
        if total is not shards[rank]:
            torch._foreach_copy_(shards[rank], total)
        exchange([(other, shards[rank], shards[other]) for other in others])
        if sent is not views:
            torch._foreach_copy_(views, sent)


def split_evenly(tensors: Sequence[Tensor], parts: int) -> list[list[Tensor]]:
    """Return views of 1-D tensors in `parts` lists with almost the same number of elements."""
    total = sum(tensor.numel() for tensor in tensors)
    ends = [total * (part + 1) // parts for part in range(parts)]
    lists: list[list[Tensor]] = [[] for _ in range(parts)]
    part, done = 0, 0
    for tensor in tensors:
        rest = tensor
        while rest.numel():
            size = min(rest.numel(), ends[part] - done)
            lists[part].append(rest[:size])
            rest, done = rest[size:], done + size
            part += done == ends[part] and part < parts - 1
    return lists


def exchange(messages: Sequence[tuple[int, list[Tensor], list[Tensor]]]) -> None:
    """Send tensors to and receive others from ranks, given as (rank, sent, received)."""
    operations = []
    for other, sent, received in messages:
        operations += [dist.P2POp(dist.isend, tensor, other) for tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, other) for tensor in received]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


class GradientTree:
    """The gradients of the micro-batches of a step, summed in the order of the tree.

    At most `tree_depth` gradients of each parameter are alive.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world_size: int,
        *,
        dtype: GradReduceDtype = "fp32",
    ) -> None:
        self.parameters = parameters
        self.stack: list[list[Tensor]] = []
        self.used: list[nn.Parameter] = []  # that the loss depends on
        self.all_reduce = TreeAllReduce(world_size, dtype=dtype) if world_size > 1 else None

    def before_backward(self, additions: int) -> None:
        """Let the backward of a micro-batch do the first addition that follows it, in place."""
        if additions:
            self.give(self.stack.pop())

    def after_backward(self, additions: int) -> None:
        """Take the gradients from the parameters, and add the topmost ones."""
        self.used = [parameter for parameter in self.parameters if parameter.grad is not None]
        self.stack.append([p.grad for p in self.used if p.grad is not None])
        for parameter in self.used:
            parameter.grad = None
        for _ in range(additions - 1):
            newer = self.stack.pop()
            torch._foreach_add_(self.stack[-1], newer)

    def give(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.used, gradients, strict=True):
            parameter.grad = gradient

    def reduce(self) -> None:
        """Give the parameters the sum of all gradients, on all ranks. Collective."""
        (gradients,) = self.stack
        self.stack = []
        if self.all_reduce:
            self.all_reduce(gradients)
        self.give(gradients)
