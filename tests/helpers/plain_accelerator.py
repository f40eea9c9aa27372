"""Train with an Accelerator that a script created without options, and print those of DDP."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from cifar_dist.distributed.ddp import wrap_ddp
from cifar_dist.distributed.launch import destroy_distributed
from cifar_dist.recipe.load import load_recipe
from cifar_dist.train import train


def main(arguments: list[str]) -> int:
    path, *overrides = arguments
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)  # Accelerate sets it, too, and it affects the last bits
    model = torch.nn.Linear(1, 1)
    wrapped = wrap_ddp(accelerator, model, micro_batches=accelerator.num_processes)
    if wrapped is not model:
        print(f"static_graph={wrapped.static_graph} broadcast_buffers={wrapped.broadcast_buffers}")
    train(load_recipe(Path(path), overrides), accelerator)
    destroy_distributed(accelerator)
    return 0
