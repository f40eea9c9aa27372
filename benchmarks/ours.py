"""Our side of the comparisons: data, loop and step as in train.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from accelerate import Accelerator
from measure import Work
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch, BatchPlan, gather_batch, train_batches
from cifar_dist.data.dataset import Split
from cifar_dist.distributed.tree_sum import GradReduceDtype, Reduction
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.heads import LinearHead, Outputs
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer, set_learning_rate
from cifar_dist.optim.schedule import learning_rate
from cifar_dist.recipe.schema import CudaGraphs
from cifar_dist.training.graphed_step import StepFn, build_step
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig
from cifar_dist.utils.precision import Precision, make_scaler

BATCH_SIZE = 250
LOG_EVERY = 50
OPTIM = OptimConfig(name="adamw", lr=0.001, weight_decay=0.001, max_grad_norm=5.0)
CROP_FLIP = AugmentConfig(crop_padding=4, hflip=True)


class FewPixels(nn.Module):
    """Map images (float or uint8 [B, 3, 32, 32]) to the mean of 16 pixels, [B, 3]."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::8, ::8].float().mean((2, 3))


class NullModel(nn.Module):
    """A model of negligible cost: a linear head on the mean of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = FewPixels()
        self.head = LinearHead(3, 100)

    def forward(self, images: Tensor) -> Outputs:
        return self.head(self.pixels(images))


def our_model(device: torch.device, config: ModelConfig) -> nn.Module:
    return build_model(config, 100).to(device).to(memory_format=torch.channels_last)


def our_batches(
    split: Split,
    *,
    batch_size: int = BATCH_SIZE,
    micro_batches: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Batch]]:
    return train_batches(
        split,
        torch.arange(len(split.labels)),
        BatchPlan(
            seed=0,
            shuffle=True,
            batch_size=batch_size,
            micro_batches=micro_batches,
            rank=rank,
            world_size=world_size,
        ),
        start_step=0,
    )


def constant_batch(split: Split, batch_size: int) -> Iterator[list[Batch]]:
    """Yield the first rows forever."""
    rows = torch.arange(batch_size, device=split.labels.device)
    batch = [gather_batch(split, rows, epoch=0, micro_batch=0)]
    while True:
        yield batch


def our_loop(
    split: Split,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    augment: AugmentConfig = CROP_FLIP,
    precision: Precision = "fp32",
    batches: Iterator[list[Batch]] | None = None,
    batch_size: int = BATCH_SIZE,
    cuda_graphs: CudaGraphs = "auto",
) -> Work:
    """Return the training step of train.py in one process, logging every 50 steps."""
    steps, batches = count(), batches or our_batches(split, batch_size=batch_size)
    optimizer = build_optimizer(OPTIM, model)
    objective = Objective(Augment(augment, split), {"cross_entropy": CrossEntropy()})
    update = our_step(
        model,
        objective,
        optimizer,
        accelerator,
        precision=precision,
        batch_size=batch_size,
        cuda_graphs=cuda_graphs,
    )
    window = MetricWindow(objective.names, micro_batches=1, device=accelerator.device)

    def step() -> int:
        number = next(steps)
        lr = learning_rate(OPTIM, number, total_steps=1_000_000, steps_per_epoch=200)
        set_learning_rate(optimizer, lr)
        window.add(update(next(batches), step=number))
        if window.steps == LOG_EVERY:
            window.read()
            window.clear()
        return batch_size

    return step


def our_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    precision: Precision = "fp32",
    batch_size: int = BATCH_SIZE,
    micro_batches: int = 1,
    cuda_graphs: CudaGraphs = "auto",
    reduction: Reduction = "exact",
    grad_reduce_dtype: GradReduceDtype = "fp32",
) -> StepFn:
    """Build the step as train.py does: CUDA graphs on a GPU, gradients summed over the processes."""
    return build_step(
        accelerator,
        model,
        objective,
        optimizer,
        make_scaler(precision, accelerator.device),
        StepConfig(
            precision=precision,
            seed=0,
            batch_size=batch_size,
            max_grad_norm=OPTIM.max_grad_norm,
            reduction=reduction,
            grad_reduce_dtype=grad_reduce_dtype,
        ),
        cuda_graphs=cuda_graphs,
        micro_batches=micro_batches,
    )
