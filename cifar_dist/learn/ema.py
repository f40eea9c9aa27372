"""Floor 2. A second model whose parameters are a running average of the first one's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cifar_dist.config import Count, Share, config


@config
class EmaConfig:
    """average <- decay * average + (1 - decay) * parameters, after every `every_steps` updates."""

    decay: Share = 0.999
    every_steps: Count = 1
    warmup: bool = True  # a shorter memory at first: decay at most (1 + t) / (10 + t), t averagings


class Ema:
    """An exponential moving average of a model (Polyak and Juditsky 1992), as a model in eval mode.

    All its state is `model`: `update` depends on nothing but that, the other model and the step.
    """

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in `model` after `step` updates (1, 2, ...); buffers are copied, not averaged."""
        if step % self.config.every_steps:
            return
        t = step // self.config.every_steps
        decay = self.config.decay
        if self.config.warmup:
            decay = min(decay, (1 + t) / (10 + t))
        averages: list[Tensor] = list(self.model.parameters())
        parameters: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
