"""Random tensors and model outputs for tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from cifar_dist.models.heads import Outputs


def outputs_of(logits: Tensor) -> Outputs:
    """Return outputs with these logits and zeros as embedding and class weights."""
    return Outputs(logits, logits.new_zeros(len(logits), 1), logits.new_zeros(logits.shape[1], 1))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
