"""`cifar_dist.train` with the step that a GPU would record; here its pieces are done by hand."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist import train
from cifar_dist.training.graphed_step import GraphedStep, StepFn
from cifar_dist.training.objective import Objective


def main(arguments: list[str]) -> int:
    def build_graphed_step(
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        cuda_graphs: str,
        micro_batches: int,
        sam: object,
        restore_buffers: bool = False,
        **settings: Any,
    ) -> StepFn:
        assert sam is None
        assert not restore_buffers
        return GraphedStep(
            model,
            objective,
            optimizer,
            device=accelerator.device,
            world_size=accelerator.num_processes,
            new_recorder=None,
            **settings,
        )

    train.build_step = build_graphed_step
    return train.main(arguments)
