"""One update of the weights from the micro-batches of a rank."""

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
from cifar_dist.distributed.tree_sum import GradientTree, GradReduceDtype, Reduction, tree_order
from cifar_dist.optim.sam import SamConfig
from cifar_dist.training.objective import Objective, sum_terms
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.precision import Precision, autocast
from cifar_dist.utils.random import derive_seed


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a recipe says about a step."""

    precision: Precision
    seed: int
    batch_size: int  # of the global batch
    max_grad_norm: float | None
    sam: SamConfig | None = None
    reduction: Reduction = "exact"
    grad_reduce_dtype: GradReduceDtype = "fp32"


@dataclass(frozen=True)
class StepResult:
    """What one update returns for the log, on the device."""

    micro_batches: slice  # those of the global batch that this rank computed
    sums: Tensor  # f32 [micro-batches of this rank, terms]: each term summed over the samples
    skipped: Tensor  # bool []: the gradient was not finite and no weight changed


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: StepConfig,
    micro_batches: list[Batch],
    *,
    step: int,
    tree: GradientTree | None = None,
) -> StepResult:
    """Update the weights with the gradient of the mean loss over the global batch.

    The loss of a micro-batch is a sum, scaled by 1 / batch_size. With `tree` the gradients of all
    micro-batches are added in its order. Without it `model` is under DDP, which averages gradients over the
    ranks, so the loss is scaled by world_size as well; under fp16 that factor is applied after the backward,
    so that overflow and underflow do not depend on the world size.

    A loss or gradient that is not finite changes no weight on any rank. With SAM each micro-batch is
    perturbed by its own gradient (m-SAM, Foret et al. 2021, section 4.1).
    """
    world_size, device = accelerator.num_processes, accelerator.device
    factor = 1 if tree else world_size
    grad_scale = factor if scaler.is_enabled() else 1
    loss_scale = factor / grad_scale / config.batch_size
    count = len(micro_batches)
    order = tree_order(count) if tree else [(index, 0) for index in range(count)]
    sums: dict[int, Tensor] = {}
    with autocast(config.precision, device):
        augmented = objective.augment_batches(micro_batches)
    for index, additions in order:
        batch = micro_batches[index]
        seed = partial(
            seed_dropout, device, seed=config.seed, step=step, micro_batch=batch.micro_batch
        )
        seed()  # for a teacher in train mode
        with autocast(config.precision, device):
            inputs = objective.prepare_inputs(augmented[index], batch)
        seed()
        is_first, is_last = batch.micro_batch == 0, index == count - 1
        if tree:
            tree.before_backward(additions)
        with nullcontext() if tree or is_last else accelerator.no_sync(model):
            first_model = unwrap_model(model) if config.sam else model
            with bn_stats_enabled(model, is_first), autocast(config.precision, device):
                terms = objective.compute_losses(first_model, inputs)
            if config.sam is None:
                backward(scaler, terms["loss"].sum() * loss_scale)
            else:
                first_loss = scaler.scale(terms["loss"].sum() / config.batch_size)
                with sam_perturbation(config.sam, model, first_loss) as finite:
                    seed()  # the second forward drops the same activations
                    with bn_stats_enabled(model, False), autocast(config.precision, device):
                        loss = objective.compute_losses(model, inputs)["loss"]
                    backward(scaler, loss.sum() * loss_scale * finite)
        if tree:
            tree.after_backward(additions)
        sums[index] = sum_terms(terms)
    if tree:
        tree.reduce()
    skipped = optimizer_step(
        model, optimizer, scaler, grad_scale=grad_scale, max_grad_norm=config.max_grad_norm
    )
    optimizer.zero_grad(set_to_none=True)
    stacked = torch.stack([sums[index] for index in range(count)])
    return StepResult(micro_batches_of_rank(micro_batches, world_size), stacked, skipped)


def micro_batches_of_rank(micro_batches: list[Batch], world_size: int) -> slice:
    """Return which micro-batches of the global batch these are."""
    return slice(micro_batches[0].micro_batch, None, world_size)


def backward(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """Backpropagate a loss, f32 []. All gradients are NaN if it is not finite, on every rank."""
    scaler.scale(loss).backward(gradient=1 + 0 * loss.detach())


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    grad_scale: int,
    max_grad_norm: float | None,
) -> Tensor:
    """Multiply gradients by `grad_scale`, clip, and step if all are finite; return bool [] skipped.

    Gradients are already averaged, so all ranks decide the same. Fused optimizers skip on the device
    (`found_inf`); others cost one host read per step.
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


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model without DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sam_perturbation(
    sam: SamConfig, model: nn.Module, loss: Tensor
) -> AbstractContextManager[Tensor]:  # float32 []
    """Perturb the weights along the gradient of `loss` inside the context.

    The perturbation gradient bypasses DDP's all-reduce.
    """
    named = [(name, p) for name, p in unwrap_model(model).named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        loss, [parameter for _, parameter in named], allow_unused=True, materialize_grads=True
    )
    return sam.perturbed_weights(named, gradients)


@contextmanager
def bn_stats_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Update BatchNorm running statistics inside the context only if `enabled`.

    They follow the first forward of micro-batch 0, and therefore do not depend on the world size.
    """
    norms = () if enabled else (m for m in model.modules() if isinstance(m, _BatchNorm))
    disabled = [module for module in norms if module.track_running_stats]
    for module in disabled:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in disabled:
            module.track_running_stats = True


def seed_dropout(device: torch.device, *, seed: int, step: int, micro_batch: int) -> None:
    """Seed dropout on `device` with the key of this micro-batch of this step."""
    device_generator(device).manual_seed(derive_seed("step", seed, step, micro_batch))


def device_generator(device: torch.device) -> torch.Generator:
    """Return the generator of dropout on `device`.

    torch.manual_seed would seed those of all backends, which takes half a millisecond.
    """
    match device.type:
        case "cpu":
            return torch.default_generator
        case "cuda":
            return torch.cuda.default_generators[device.index or 0]
        case "mps":
            return torch.mps._get_default_mps_generator()
    raise UserError(f"training on {device.type} is not supported: use cuda, mps or cpu")
