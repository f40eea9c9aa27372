"""Classification metrics of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return loss, top1 and top5 (percent) of f32 [N, C] logits and int64 [N] labels.

    Computed in float64. Among equal logits the lower class index ranks higher, as in `argmax`, on
    every device.
    """
    if not logits.is_cuda:  # MPS has no float64
        logits, labels = logits.cpu(), labels.cpu()
    logits, column = logits.double(), labels[:, None]
    target = logits.gather(1, column)
    precedes = torch.arange(logits.shape[1], device=logits.device) < column
    # Negated, so that NaN logits count as higher and never as correct.
    rank = (~((logits < target) | ((logits == target) & ~precedes))).sum(1)
    return {
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "top1": 100.0 * (rank == 0).double().mean().item(),
        "top5": 100.0 * (rank < 5).double().mean().item(),
    }
