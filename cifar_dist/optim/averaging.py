"""Averages of the weights during training: EMA and SWA."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from cifar_dist.utils.config import Count, Share, config
from cifar_dist.utils.errors import UserError


@config
class AveragingConfig:
    """How the weights are averaged during training; the average is evaluated.

    `ema`: average <- decay * average + (1 - decay) * weights, after every `every_steps` updates.

    `swa`: the mean of the weights at the end of each epoch from `start_epoch` on.
    """

    kind: Literal["ema", "swa"] = "ema"  # exponential moving average, or mean over epoch ends
    decay: Share = 0.999  # factor of the old average in an EMA update
    every_steps: Count = 1  # steps between EMA updates
    warmup: bool = True  # limit the decay to (1 + t) / (10 + t) at EMA update t = 1, 2, ...
    # first epoch of the SWA mean, counted from 1; required for swa
    start_epoch: Count | None = None

    def __post_init__(self) -> None:
        if (self.kind == "swa") != (self.start_epoch is not None):
            raise ValueError("kind: swa and start_epoch need each other; set both or neither")
        if self.kind == "swa" and (self.decay, self.every_steps, self.warmup) != (0.999, 1, True):
            raise ValueError("decay, every_steps and warmup apply to kind: ema only; remove them")


class TensorPairs:
    """Pairs each tensor of an average with its model's, listed once rather than at every update.

    Buffers are looked up by name at each update, as DDP replaces the model's buffer tensors.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self.average, self.model = average, model
        self.average_parameters: list[Tensor] = list(average.parameters())
        self.parameters: list[Tensor] = list(model.parameters())
        # Grouped by dtype: on a GPU, _foreach_copy_ copies a mixed list tensor by tensor.
        self.average_buffers: dict[torch.dtype, list[Tensor]] = {}
        self.buffer_names: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}
        for averaged, module in zip(average.modules(), model.modules(), strict=True):
            for name, buffer in averaged.named_buffers(recurse=False):
                self.average_buffers.setdefault(buffer.dtype, []).append(buffer)
                self.buffer_names.setdefault(buffer.dtype, []).append((module, name))

    def with_model(self, model: nn.Module) -> TensorPairs:
        """Return self, or new pairs if `model` is another object than before."""
        return self if model is self.model else TensorPairs(self.average, model)

    def update(self, weight: float) -> None:
        """Move the average by the fraction `weight` towards the parameters; copy the buffers."""
        torch._foreach_lerp_(self.average_parameters, self.parameters, weight)
        for dtype, copies in self.average_buffers.items():
            buffers = [getattr(module, name) for module, name in self.buffer_names[dtype]]
            torch._foreach_copy_(copies, buffers)


class Ema:
    """An exponential moving average of a model (Polyak and Juditsky 1992), as a model in eval mode.

    `model` is all its state: an update depends on nothing else but the trained model and the step.
    """

    def __init__(self, config: AveragingConfig, model: nn.Module) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = TensorPairs(self.model, model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in `model` after update `step` (1, 2, ...); buffers are copied."""
        if step % self.config.every_steps:
            return
        t = step // self.config.every_steps
        decay = self.config.decay
        if self.config.warmup:
            decay = min(decay, (1 + t) / (10 + t))
        self.pairs = self.pairs.with_model(model)
        self.pairs.update(1 - decay)

    def needs_bn_update(self, step: int) -> bool:
        """Return False: the copied BatchNorm statistics are close enough to the average's."""
        return False


class Swa:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407), as a model in eval mode.

    `model` is all its state. Before `start_epoch` it is the trained model at the last epoch's end.
    """

    def __init__(self, model: nn.Module, *, start_epoch: int, steps_per_epoch: int) -> None:
        self.start_epoch, self.steps_per_epoch = start_epoch, steps_per_epoch
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = TensorPairs(self.model, model)

    def num_averaged(self, step: int) -> int:
        """Return how many epoch ends the average has after `step` updates, beyond the first."""
        return max(step // self.steps_per_epoch - self.start_epoch, 0)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in `model` after update `step` (1, 2, ...) if it is the last of an epoch."""
        if step % self.steps_per_epoch:
            return
        self.pairs = self.pairs.with_model(model)
        self.pairs.update(1 / (1 + self.num_averaged(step)))

    def needs_bn_update(self, step: int) -> bool:
        """Return whether `model` is an average, for which BatchNorm has no statistics yet."""
        return self.num_averaged(step) > 0


WeightAverage = Ema | Swa


def build_average(
    config: AveragingConfig | None,
    model: nn.Module,
    *,
    steps_per_epoch: int,
    total_steps: int,
    first_step: int = 0,
) -> WeightAverage | None:
    """Return the configured average, which starts after `first_step` updates.

    UserError if the run ends before its first update.
    """
    if config is None:
        return None
    if config.every_steps > total_steps:
        raise UserError(
            f"averaging.every_steps={config.every_steps} is more than all {total_steps} steps, so the "
            "average would stay at the initial weights; lower it, or remove averaging"
        )
    if config.kind == "swa":
        assert config.start_epoch is not None, "AveragingConfig refuses this"
        start_epoch = max(config.start_epoch, -(-first_step // steps_per_epoch))
        return Swa(model, start_epoch=start_epoch, steps_per_epoch=steps_per_epoch)
    return Ema(config, model)
