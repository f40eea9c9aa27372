"""Classification metrics of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return loss, top1 and top5 (percent) of f32 [N, C] logits and int64 [N] labels, on their device.

    In float64. Of equal logits the first counts as larger, as `argmax` has it, on any device.
    """
    if not logits.is_cuda:  # a Mac's GPU has no float64
        logits, labels = logits.cpu(), labels.cpu()
    logits, column = logits.double(), labels[:, None]
    own = logits.gather(1, column)
    first = torch.arange(logits.shape[1], device=logits.device) < column
    # all that is not below it; a number that is NaN is below nothing
    rank = (~((logits < own) | ((logits == own) & ~first))).sum(1)
    return {
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "top1": 100.0 * (rank == 0).double().mean().item(),
        "top5": 100.0 * (rank < 5).double().mean().item(),
    }
