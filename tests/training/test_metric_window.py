"""The sums between two reports: what a report makes of them, and what it leaves behind."""

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


def test_the_pace_counts_pictures_over_all_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    ours = window()
    ours.steps, ours.seconds = 4, 6.0  # before a restart
    now += 2
    with ours.timer_paused():
        now += 50  # an evaluation
    assert ours.report(batch_size=10, may_skip=False)["images_per_second"] == pytest.approx(5)


def test_means_are_over_the_steps_that_were_made() -> None:
    ours = window()
    ours.steps, ours.sums = 3, torch.tensor([[10.0, 10.0], [20.0, 30.0]])
    ours.skips[1] = 1
    report = ours.report(batch_size=5, may_skip=True)
    assert (report["cross_entropy"], report["loss"], report["skipped"]) == (3, 4, 1)


def test_what_broke_is_forgotten_with_its_window() -> None:
    ours = window()
    ours.nonfinite[1, 0] = 1
    assert ours.nonfinite_terms(ALONE) == "cross_entropy on rank 0"
    ours.clear()
    assert ours.nonfinite_terms(ALONE) == "the gradient, though no loss was"
