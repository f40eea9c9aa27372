"""Floor 2. A second model whose parameters are an average of the first one's, on its way."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from cifar_dist.utils.config import Count, Share, config
from cifar_dist.utils.errors import UserError


@config
class AveragingConfig:
    """`ema`: average <- decay * average + (1 - decay) * parameters, after every `every_steps` updates.

    `swa`: the equal average of the parameters at the end of each epoch from `start_epoch` on.
    """

    kind: Literal["ema", "swa"] = "ema"
    decay: Share = 0.999
    every_steps: Count = 1
    warmup: bool = True  # a shorter memory at first: decay at most (1 + t) / (10 + t), t averagings
    start_epoch: Count | None = None  # of swa; epochs count from 1

    def __post_init__(self) -> None:
        if (self.kind == "swa") != (self.start_epoch is not None):
            raise ValueError("kind: swa and start_epoch need each other; write both or neither")
        if self.kind == "swa" and (self.decay, self.every_steps, self.warmup) != (0.999, 1, True):
            raise ValueError("decay, every_steps and warmup are those of kind: ema; remove them")


class Pairs:
    """The tensors of an average and of its model, listed once: each time would walk all modules.

    Buffers are looked up by name at each update, since DDP puts others in place of the model's.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self.averaged, self.model = average, model
        self.averages: list[Tensor] = list(average.parameters())
        self.parameters: list[Tensor] = list(model.parameters())
        # by dtype, as a GPU copies a mixed list tensor by tensor
        self.copies: dict[torch.dtype, list[Tensor]] = {}
        self.places: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}
        for copied, module in zip(average.modules(), model.modules(), strict=True):
            for name, buffer in copied.named_buffers(recurse=False):
                self.copies.setdefault(buffer.dtype, []).append(buffer)
                self.places.setdefault(buffer.dtype, []).append((module, name))

    def of(self, model: nn.Module) -> Pairs:
        """Return these pairs, or those of the same average with another model."""
        return self if model is self.model else Pairs(self.averaged, model)

    def average(self, weight: float) -> None:
        """Move the averages towards the parameters by this part of the way; copy the buffers."""
        torch._foreach_lerp_(self.averages, self.parameters, weight)
        for dtype, copies in self.copies.items():
            buffers = [getattr(module, name) for module, name in self.places[dtype]]
            torch._foreach_copy_(copies, buffers)


class Ema:
    """An exponential moving average of a model (Polyak and Juditsky 1992), as a model in eval mode.

    All its state is `model`: `update` depends on nothing but that, the other model and the step.
    """

    def __init__(self, config: AveragingConfig, model: nn.Module) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = Pairs(self.model, model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in `model` after `step` updates (1, 2, ...); buffers are copied, not averaged."""
        if step % self.config.every_steps:
            return
        t = step // self.config.every_steps
        decay = self.config.decay
        if self.config.warmup:
            decay = min(decay, (1 + t) / (10 + t))
        self.pairs = self.pairs.of(model)
        self.pairs.average(1 - decay)

    def needs_bn_update(self, step: int) -> bool:
        """Whether the model's buffers are not those of its parameters: never so few steps apart."""
        return False


class Swa:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407), as a model in eval mode.

    Before the first averaging it is the model of the last epoch's end. All its state is `model`.
    """

    def __init__(self, config: AveragingConfig, model: nn.Module, *, steps_per_epoch: int) -> None:
        assert config.start_epoch is not None, "EmaConfig has refused it"
        self.start_epoch, self.steps_per_epoch = config.start_epoch, steps_per_epoch
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = Pairs(self.model, model)

    def averaged(self, step: int) -> int:
        """How many epochs' ends stand for the average after `step` updates, beyond the first."""
        return max(step // self.steps_per_epoch - self.start_epoch, 0)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in `model` after `step` updates (1, 2, ...), if they end an epoch."""
        if step % self.steps_per_epoch:
            return
        self.pairs = self.pairs.of(model)
        self.pairs.average(1 / (1 + self.averaged(step)))

    def needs_bn_update(self, step: int) -> bool:
        """Whether the parameters are an average already, for which BatchNorm has no statistics."""
        return self.averaged(step) > 0


WeightAverage = Ema | Swa


def build_average(
    config: AveragingConfig | None, model: nn.Module, *, steps_per_epoch: int, total_steps: int
) -> WeightAverage | None:
    """UserError where the run would end before the first averaging."""
    if config is None:
        return None
    if config.every_steps > total_steps:
        raise UserError(
            f"averaging.every_steps={config.every_steps} is more than all {total_steps} steps, so the "
            "average would stay the first weights; lower it, or remove averaging"
        )
    if config.kind == "swa":
        return Swa(config, model, steps_per_epoch=steps_per_epoch)
    return Ema(config, model)
