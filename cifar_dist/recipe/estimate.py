"""Estimate parameters, FLOPs and memory of a training without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.models.classifier import num_parameters
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer

SAMPLES = 4  # BatchNorm needs two, and mixed resolution halves them


def activation_bytes(model: nn.Module) -> tuple[int, int]:
    """Return (activation bytes of one sample in float32, forward FLOPs of one sample).

    Call it under FakeTensorMode, with a model built there: nothing is computed.
    """
    images = torch.zeros(SAMPLES, 3, 32, 32, dtype=torch.uint8)  # of any size: the model resizes
    weights = {storage_id(parameter) for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # keeps storages alive, so that their addresses stay unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in weights:
            alive.append(tensor)
            kept[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(images)
    return sum(kept.values()) // SAMPLES, counter.get_total_flops() // SAMPLES


def storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def optimizer_states(config: OptimConfig) -> int:
    """Return how many values the optimizer keeps per weight, found by a step of a tiny model."""
    model = nn.Linear(8, 8, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = build_optimizer(config, model)
    optimizer.step()
    states = optimizer.state[model.weight].values()
    kept = sum(state.numel() for state in states if isinstance(state, torch.Tensor))
    return round(kept / model.weight.numel())


def estimate(
    model: nn.Module,
    *,
    batch_size: int,
    micro_batches: int,
    states: int,
    averaging: bool,
    half: bool,
) -> dict[str, Any]:
    """Return parameters, forward FLOPs per image, and the memory of one process in bytes.

    Memory is a lower bound: weights, gradients, `states` values per weight of the optimizer, average, and the
    activations of one micro-batch (half as large under autocast), without workspaces.
    """
    parameters = num_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    activations, flops = activation_bytes(model)
    micro_batch = -(-batch_size // micro_batches)
    fixed = 4 * (parameters + trained * (1 + states) + (parameters if averaging else 0))
    return {
        "parameters": parameters,
        "forward_flops_per_image": flops,
        "memory_bytes": fixed + micro_batch * activations // (2 if half else 1),
    }
