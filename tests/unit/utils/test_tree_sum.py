"""The tree of additions: ranks compute subtrees of it, so the sum has the same bits for any power of two."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.distributed.tree_sum import (
    GradientTree,
    is_exact,
    split_evenly,
    tree_depth,
    tree_order,
    tree_sum,
)


def values_of(count: int) -> list[list[Tensor]]:
    """Return values of very different size, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, 1000, generator=generator)
    return [[value * 10.0 ** (index % 5)] for index, value in enumerate(values)]


def sum_over_ranks(values: list[list[Tensor]], world_size: int) -> Tensor:
    """Return the sum as ranks compute it: a tree over the values of each rank, then one over these sums."""
    local = [tree_sum(values[rank::world_size]) for rank in range(world_size)]
    return tree_sum(local)[0]


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 31, 32])
def test_ranks_have_the_bits_of_one_process(micro_batches: int) -> None:
    values = values_of(micro_batches)
    expected = sum_over_ranks(values, 1)
    for world_size in range(1, micro_batches + 1):
        same = torch.equal(sum_over_ranks(values, world_size), expected)
        assert same or not is_exact(micro_batches, world_size), world_size
    assert is_exact(micro_batches, micro_batches)


def test_other_orders_have_other_bits() -> None:
    """The test above could not fail otherwise."""
    values = values_of(6)
    in_sequence = reduce(torch.add, (value for (value,) in values))
    assert not torch.equal(in_sequence, sum_over_ranks(values, 1))
    assert not torch.equal(sum_over_ranks(values, 3), sum_over_ranks(values, 1))
    assert not is_exact(6, 3)


@pytest.mark.parametrize("leaves", range(1, 40))
def test_stack_holds_few_values(leaves: int) -> None:
    height, highest = 0, 0
    for _, additions in tree_order(leaves):
        height += 1
        highest = max(highest, height)
        height -= additions
    assert height == 1
    assert highest <= tree_depth(leaves)
    assert sorted(leaf for leaf, _ in tree_order(leaves)) == list(range(leaves))


def test_siblings_are_half_the_micro_batches_apart() -> None:
    assert tree_order(8) == [(0, 0), (4, 1), (2, 0), (6, 2), (1, 0), (5, 1), (3, 0), (7, 3)]


def test_addition_in_place_has_the_same_bits() -> None:
    values = values_of(7)
    expected = tree_sum(values)[0]
    assert torch.equal(tree_sum(values, in_place=True)[0], expected)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shards_are_even_and_cover_all_elements(parts: int) -> None:
    tensors = [torch.arange(size) for size in (5, 1, 100, 7, 64)]
    shards = split_evenly(tensors, parts)
    sizes = [sum(piece.numel() for piece in shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(
        torch.cat([piece for shard in shards for piece in shard]), torch.cat(tensors)
    )


def test_gradients_of_parameters_that_the_loss_does_not_depend_on_stay_none() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    tree = GradientTree([used, unused], 1)
    for factor, (_, additions) in zip((1.0, 2.0, 4.0), tree_order(3), strict=True):
        tree.before_backward(additions)
        (factor * used).sum().backward()
        tree.after_backward(additions)
    tree.reduce()
    assert unused.grad is None
    assert used.grad is not None
    assert used.grad.tolist() == [7.0] * 3
