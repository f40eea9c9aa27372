"""Learning rate schedules."""

from __future__ import annotations

import math

from cifar_dist.optim.optimizer import OptimConfig


def learning_rate(
    config: OptimConfig, step: int, *, total_steps: int, steps_per_epoch: int
) -> float:
    """Return the learning rate of update `step`, counted from 0.

    Warm-up is linear and reaches `lr` at its last update (Goyal et al. 2017). Then `constant`;
    `multistep`: times gamma at each milestone; `cosine`: half a cosine that would reach
    lr * final_lr_fraction at update `total_steps` (Loshchilov and Hutter 2017).
    `one_cycle` (Smith and Topin 2018) is torch's OneCycleLR: half a cosine from lr / 25 to lr over
    `warmup_epochs`, or 30 % of the run if that is 0, then half a cosine down to
    lr * final_lr_fraction, at least lr / 250,000, at the last update.
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
            fraction = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            return cosine_interpolate(config.lr, config.lr * config.final_lr_fraction, fraction)


def schedule_problem(config: OptimConfig, epochs: int) -> str | None:
    """Return why a run of `epochs` never reaches a part of its schedule, or None."""
    if config.warmup_epochs >= epochs:
        return (
            f"optim.warmup_epochs={config.warmup_epochs:g} is not less than run.epochs={epochs}, so the "
            "run ends within its warm-up; lower it"
        )
    if late := [milestone for milestone in config.milestones if milestone >= epochs]:
        listed = ", ".join(f"{milestone:g}" for milestone in late)
        return (
            f"optim.milestones: {listed} are not before the end (run.epochs={epochs}), so the learning "
            "rate does not fall there; lower them"
        )
    return None


def cosine_interpolate(start: float, end: float, fraction: float) -> float:
    """Return half a cosine from `start` at fraction 0 to `end` at fraction 1 and above."""
    return end + (start - end) * (1 + math.cos(math.pi * min(fraction, 1))) / 2
