"""The metric window: means, rates, and what is cleared."""

from __future__ import annotations

import time

import pytest
import torch

from cifar_dist.distributed.context import DistContext
from cifar_dist.training.metric_window import MetricWindow

CPU = torch.device("cpu")
ALONE = DistContext(rank=0, world_size=1, group=None)


def window() -> MetricWindow:
    return MetricWindow(["cross_entropy", "loss"], micro_batches=2, device=CPU)


def test_images_per_second_include_time_before_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    ours = window()
    ours.steps, ours.seconds = 4, 6.0  # before a restart
    now += 2
    with ours.timer_paused():
        now += 50  # an evaluation
    assert ours.report(batch_size=10, may_skip=False)["images_per_second"] == pytest.approx(5)


def test_means_exclude_skipped_steps() -> None:
    ours = window()
    ours.steps, ours.sums = 3, torch.tensor([[10.0, 10.0], [20.0, 30.0]])
    ours.skips[1] = 1
    report = ours.report(batch_size=5, may_skip=True)
    assert (report["cross_entropy"], report["loss"], report["skipped"]) == (3, 4, 1)


def test_nonfinite_terms_are_cleared_with_the_window() -> None:
    ours = window()
    ours.nonfinite[1, 0] = 1
    assert ours.nonfinite_terms(ALONE) == "cross_entropy on rank 0"
    ours.clear()
    assert ours.nonfinite_terms(ALONE) == "the gradient, though all losses are finite"
