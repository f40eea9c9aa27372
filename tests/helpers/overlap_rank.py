"""Trace a backward of ResNet-18 under DDP, and write the time spans of backward and all-reduce."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cifar_dist.distributed.ddp import wrap_ddp
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.models.classifier import ModelConfig, build_model


def main(arguments: list[str]) -> int:
    (output,) = arguments
    accelerator = init_distributed(timeout_seconds=60, threads=1)
    model = build_model(ModelConfig(backbone="resnet18"), 100)
    wrapped = wrap_ddp(accelerator, model, micro_batches=accelerator.num_processes)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)

    def step() -> None:
        loss = wrapped(images).logits.square().mean()
        with record_function("backward"):
            loss.backward()

    step()  # DDP orders its buckets by the first backward
    step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    spans: dict[str, list[tuple[float, float]]] = {"backward": [], "gloo:all_reduce": []}
    for event in trace.events():
        if event.name in spans:
            spans[event.name].append((event.time_range.start, event.time_range.end))
    if accelerator.is_main_process:
        Path(output).write_text(json.dumps(spans))
    destroy_distributed(accelerator)
    return 0
