"""Learning rate of every step."""

from __future__ import annotations

import math

from cifar_dist.optim.optimizer import OptimConfig


def learning_rate(
    config: OptimConfig, step: int, *, total_steps: int, steps_per_epoch: int
) -> float:
    """The learning rate of update number `step`, counted from 0.

    Warm-up is linear and reaches `lr` at its last update (Goyal et al. 2017). Then `constant`;
    `multistep`: times gamma at each milestone; `cosine`: half a cosine that would reach
    lr * final_lr_fraction at update `total_steps` (Loshchilov and Hutter 2017).
    `one_cycle` (Smith and Topin 2018) is torch's OneCycleLR: over `warmup_epochs`, or 30 % of the
    run where that is 0, half a cosine from lr / 25 up to lr, then another down to its last
    update, to lr * final_lr_fraction, but at least lr / 250,000.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "one_cycle":
        peak = max((warmup_steps or 0.3 * total_steps) - 1, 0)
        if step < peak:
            return cosine_interpolate(config.lr / 25, config.lr, step / peak)
        last = config.lr * max(config.final_lr_fraction, 1 / 250_000)
        return cosine_interpolate(config.lr, last, (step - peak) / max(total_steps - 1 - peak, 1))

    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    match config.schedule:
        case "constant":
            return config.lr
        case "multistep":
            passed = sum(step >= round(epoch * steps_per_epoch) for epoch in config.milestones)
            return config.lr * config.gamma**passed
        case "cosine":
            share = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            return cosine_interpolate(config.lr, config.lr * config.final_lr_fraction, share)


def cosine_interpolate(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` at share 0 to `end` at share 1 and beyond."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1))) / 2
