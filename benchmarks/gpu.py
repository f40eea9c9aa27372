"""What only a GPU can tell of a step: kernels, memory, and the least time that it could take."""

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

from cifar_dist.models.backbones import ModelConfig, build_model, num_parameters
from cifar_dist.recipe.estimate import activation_bytes
from cifar_dist.training.cuda_graphs import WARM_UP


@dataclass(frozen=True)
class Gpu:
    """Of the data sheet: dense bf16 operations and bytes of memory traffic a second."""

    flops: float
    bandwidth: float


GPUS = {  # a part of torch.cuda.get_device_name()
    "H200": Gpu(989e12, 4.8e12),
    "H100": Gpu(989e12, 3.35e12),
    "A100-SXM4-80GB": Gpu(312e12, 2.04e12),
    "A100": Gpu(312e12, 1.55e12),
    "RTX 4090": Gpu(165e12, 1.01e12),
}


def floor_milliseconds(config: ModelConfig, batch_size: int, gpu: Gpu) -> float:
    """The least time of a training step in bf16 with AdamW, were every kernel perfect.

    Forward and backward: the longer of three times the forward's operations at the peak, and the
    traffic of what is kept for the backward (2 bytes a value, written and read once, and as much for
    its gradients). Then AdamW: gradient read, weight and two moments read and written, 28 bytes a
    weight. No launches, no loader, no evaluation; kept values of 32-bit kernels count half.
    """
    with FakeTensorMode():
        model = build_model(config, 100)
        activations, flops = activation_bytes(model)  # float32, one picture
    compute = 3 * flops * batch_size / gpu.flops
    traffic = 4 * (activations / 2) * batch_size / gpu.bandwidth
    update = 28 * num_parameters(model) / gpu.bandwidth
    return 1000 * (max(compute, traffic) + update)


def of_one_step(
    make: Callable[[], Work], config: ModelConfig | None, batch_size: int
) -> dict[str, Any]:
    """Kernels (copies included) of a step and memory of all but the data; for our nets the floor.

    The loop that `make` returns is made for this alone, and recorded where it records its step.
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
    found: dict[str, Any] = {"batch_size": batch_size, "kernels": kernels, "memory_bytes": memory}
    name = torch.cuda.get_device_name()
    gpu = next((gpu for part, gpu in GPUS.items() if part in name), None)
    if config and gpu:
        found["floor_milliseconds"] = floor_milliseconds(config, batch_size, gpu)
    return found
