"""`cifar_dist.train` with the step of a GPU, its parts eager instead of CUDA graphs."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist import train
from cifar_dist.training import loop
from cifar_dist.training.graphed_step import GraphedStep, StepFn
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig


def main(arguments: list[str]) -> int:
    def build_graphed_step(
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: StepConfig,
        *,
        cuda_graphs: str,
        micro_batches: int,
        restore_buffers: bool = False,
    ) -> StepFn:
        assert not restore_buffers
        return GraphedStep(
            model,
            objective,
            optimizer,
            config,
            device=accelerator.device,
            world_size=accelerator.num_processes,
            new_recorder=None,
        )

    loop.build_step = build_graphed_step
    return train.main(arguments)
