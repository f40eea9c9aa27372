"""Measure what fault detection adds to a training step."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import ErrorChannel
from cifar_dist.distributed.watchdog import watchdog
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.training.graphed_step import restore_buffers_on_skip
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import sum_terms
from cifar_dist.training.state import TrainState, poll_ranks
from cifar_dist.training.step import StepResult
from cifar_dist.utils.precision import make_scaler

CPU = torch.device("cpu")


def cpu_seconds(function: Callable[[], object], *, times: int) -> float:
    """Return the minimum CPU time of a call over five rounds of `times` calls."""
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(times):
            function()
        rounds.append((time.process_time() - started) / times)
    return min(rounds)


def background_threads_share(seconds: float = 10) -> float:
    """Return the CPU share of the watchdog, error channel, heartbeats and store threads."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    channel = ErrorChannel(0, 2)  # waits for a second rank that does not exist
    context, state = DistContext(0, 2, None), SimpleNamespace(step=0, saved_step=0)
    with watchdog(context, state, seconds=600, micro_batches=1, folder=Path("runs/a")):
        time.sleep(1)
        started = time.process_time()
        time.sleep(seconds)
        used = time.process_time() - started
    channel.close()
    dist.destroy_process_group()
    return used / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=250)
    batch = parser.parse_args().batch
    torch.set_num_threads(1)
    model = build_model(ModelConfig(backbone="resnet18"), 100).train()
    images = torch.zeros(batch, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(batch) % 100
    terms: dict[str, Tensor] = {"cross_entropy": torch.ones(batch), "loss": torch.ones(batch)}
    result = StepResult(slice(0, None), sum_terms(terms)[None], torch.tensor(False))
    window = MetricWindow(list(terms), micro_batches=1, device=CPU)
    optimizer = build_optimizer(OptimConfig(), model)
    state = TrainState(model, optimizer, make_scaler("fp32", CPU), None, window)
    context = DistContext(0, 1, None)
    sums = torch.zeros(2)

    def train() -> None:
        logits = model(images).logits
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain_sums() -> None:
        sums.add_(torch.stack([terms["cross_entropy"], terms["loss"]]).sum(1))

    step = cpu_seconds(train, times=2)
    skip_step = partial(restore_buffers_on_skip, model, lambda micro_batches, *, step: result)
    costs = {
        "metric window with non-finite counts": cpu_seconds(lambda: window.add(result), times=500)
        - cpu_seconds(plain_sums, times=500),
        "poll of ranks, one rank": cpu_seconds(
            lambda: poll_ranks(state, context, save_every_minutes=10), times=500
        ),
        "copied buffers (on_nonfinite: skip)": cpu_seconds(
            lambda: skip_step([], step=0), times=100
        ),
    }
    print(json.dumps({"ms_per_step": step * 1e3, "threads": 1, "batch": batch}))
    for name, seconds in costs.items():
        print(f"{name:<38} {seconds * 1e6:7.1f} us  {100 * seconds / step:.3f} % of a step")
    share = background_threads_share()
    print(f"{'background threads':<38} {'':7}     {100 * share:.3f} % of a core")


if __name__ == "__main__":
    main()
