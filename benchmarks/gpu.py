"""Kernels, memory and minimum time of a training step on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Work
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cifar_dist.models.classifier import ModelConfig, num_parameters
from cifar_dist.recipe.dry_run import meta_model
from cifar_dist.recipe.estimate import activation_bytes
from cifar_dist.training.cuda_graphs import WARM_UP


@dataclass(frozen=True)
class Gpu:
    """Data sheet peaks: dense bf16 operations and bytes of memory traffic per second."""

    flops: float
    bandwidth: float


GPUS = {  # substring of torch.cuda.get_device_name(); first match wins
    "H200": Gpu(989e12, 4.8e12),
    "H100": Gpu(989e12, 3.35e12),
    "A100-SXM4-80GB": Gpu(312e12, 2.04e12),
    "A100": Gpu(312e12, 1.55e12),
    "RTX 4090": Gpu(165e12, 1.01e12),
}


def floor_milliseconds(config: ModelConfig, batch_size: int, gpu: Gpu) -> float:
    """Return the minimum time of a bf16 training step with AdamW on ideal kernels.

    Forward and backward take the longer of (a) three times the forward's operations at peak and
    (b) the memory traffic of the saved activations: 2 bytes per value, written and read once, and as
    much for their gradients. AdamW then moves 28 bytes per weight (reads the gradient, reads and
    writes the weight and two moments). Launches are not counted, and activations that are saved in
    32 bits count as 16.
    """
    model = meta_model(config, 100)
    with FakeTensorMode(allow_non_fake_inputs=True):
        activations, flops = activation_bytes(model.to_empty(device="cpu"))  # float32, one image
    compute = 3 * flops * batch_size / gpu.flops
    traffic = 4 * (activations / 2) * batch_size / gpu.bandwidth
    update = 28 * num_parameters(model) / gpu.bandwidth
    return 1000 * (max(compute, traffic) + update)


def profile_step(
    make: Callable[[], Work], config: ModelConfig | None, batch_size: int
) -> dict[str, Any]:
    """Return kernels per step (including copies), peak memory without the data, and the floor.

    Build a loop with `make` for this alone. The floor needs `config`, which peers do not have.
    """
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work = make()
    for _ in range(WARM_UP + 2):
        work()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    kernels = sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())
    result: dict[str, Any] = {"batch_size": batch_size, "kernels": kernels, "memory_bytes": memory}
    gpu = current_gpu()
    if config and gpu:
        result["floor_milliseconds"] = floor_milliseconds(config, batch_size, gpu)
    return result


def current_gpu() -> Gpu | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu for part, gpu in GPUS.items() if part in name), None)
