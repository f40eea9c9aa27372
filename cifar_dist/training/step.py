"""Shards -> one update of the weights. No trainer object, no callback, no hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.data.batches import Batch
from cifar_dist.optim.sam import SamConfig
from cifar_dist.training.objective import Objective, sum_terms
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.precision import Precision, autocast
from cifar_dist.utils.random import derive_seed


@dataclass(frozen=True)
class StepResult:
    """What one update returns for the log, on the device."""

    micro_batches: slice  # which of the global batch's micro-batches this rank computed
    sums: Tensor  # f32 [micro-batches of this rank, terms]: each term's sum over a micro-batch's samples
    skipped: Tensor  # bool []: the gradient was not finite, no weight has changed


def device_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from.

    torch.manual_seed would seed those of all backends, at half a millisecond a call.
    """
    match device.type:
        case "cpu":
            return torch.default_generator
        case "cuda":
            return torch.cuda.default_generators[device.index or 0]
        case "mps":
            return torch.mps._get_default_mps_generator()
    raise UserError(f"{device.type}: train on cuda, mps or cpu")


def seed_dropout(device: torch.device, *, seed: int, step: int, micro_batch: int) -> None:
    """From here on dropout on `device` draws from the key of this micro-batch of this step."""
    device_generator(device).manual_seed(derive_seed("step", seed, step, micro_batch))


@contextmanager
def bn_stats_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within, BatchNorm's running statistics move only if `leads`.

    They follow the first forward of micro-batch 0, so they are the same whether one process runs all micro-batches
    or each micro-batch has its own.
    """
    norms = () if enabled else (m for m in model.modules() if isinstance(m, _BatchNorm))
    followers = [module for module in norms if module.track_running_stats]
    for module in followers:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in followers:
            module.track_running_stats = True


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[Batch],
    *,
    precision: Precision,
    seed: int,
    step: int,
    batch_size: int,
    max_grad_norm: float | None,
    sam: SamConfig | None = None,
) -> StepResult:
    """One update with the gradient of the mean loss over the global batch of `batch_size` rows.

    Each micro-batch's loss is a sum, scaled by world_size / batch_size; DDP's mean over the ranks makes
    it the mean over the global batch. A loss or a gradient that is not finite changes no weight on
    any rank.

    Under fp16 world_size is multiplied in after the backward, which must see the same magnitudes in
    any world, or it would overflow and underflow elsewhere. With `sam` each micro-batch's gradient is that
    uphill of the weights, by the micro-batch's own gradient (m-SAM, Foret et al. 2021, section 4.1).
    """
    *_, final = micro_batches
    world_size, device = accelerator.num_processes, accelerator.device
    later = world_size if scaler.is_enabled() else 1
    scale = world_size / later / batch_size
    sums = []
    with autocast(precision, device):
        views = objective.augment_batches(micro_batches)
    for batch, augmented in zip(micro_batches, views, strict=True):
        draw = partial(seed_dropout, device, seed=seed, step=step, micro_batch=batch.micro_batch)
        draw()  # a teacher in train mode drops, too
        with autocast(precision, device):
            inputs = objective.prepare_inputs(augmented, batch)
        draw()
        with nullcontext() if batch is final else accelerator.no_sync(model):
            with bn_stats_enabled(model, batch.micro_batch == 0), autocast(precision, device):
                shard_terms = objective.compute_losses(
                    unwrap_model(model) if sam else model, inputs
                )
            if sam is None:
                backward(scaler, shard_terms["loss"].sum() * scale)
            else:
                first_loss = scaler.scale(shard_terms["loss"].sum() / batch_size)
                with sam_perturbation(sam, model, first_loss) as sound:
                    draw()  # the second forward drops the same
                    with bn_stats_enabled(model, False), autocast(precision, device):
                        loss = objective.compute_losses(model, inputs)["loss"]
                    backward(scaler, loss.sum() * scale * sound)
        sums.append(sum_terms(shard_terms))
    skipped = optimizer_step(
        model, optimizer, scaler, grad_scale=later, max_grad_norm=max_grad_norm
    )
    optimizer.zero_grad(set_to_none=True)
    return StepResult(micro_batches_of_rank(micro_batches, world_size), torch.stack(sums), skipped)


def micro_batches_of_rank(micro_batches: list[Batch], world_size: int) -> slice:
    """Return which of the global batch's micro-batches these are, those of one rank."""
    return slice(micro_batches[0].micro_batch, None, world_size)


def backward(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """Gradients of a loss, f32 []; all are NaN where it is not finite, so that every rank finds it."""
    scaler.scale(loss).backward(gradient=1 + 0 * loss.detach())


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model without DDP, whose reduction waits for one backward a step."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sam_perturbation(
    sam: SamConfig, model: nn.Module, loss: Tensor
) -> AbstractContextManager[Tensor]:  # float32 []
    """The weights uphill by the gradient of `loss`, for a time; no rank hears of that gradient."""
    named = [(name, p) for name, p in unwrap_model(model).named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        loss, [parameter for _, parameter in named], allow_unused=True, materialize_grads=True
    )
    return sam.perturbed_weights(named, gradients)


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    grad_scale: int,
    max_grad_norm: float | None,
) -> Tensor:
    """Multiply the gradients by `times`, clip, step if they are finite; bool [], True if not.

    The gradients are averaged already, so all ranks find the same. Fused optimizers leave out the
    update on the device (`found_inf`); the others cost one host read a step.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grad_scale != 1:
        torch._foreach_mul_(gradients, grad_scale)
    norm = nn.utils.get_total_norm(gradients)
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    finite = norm.isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
    return ~finite
