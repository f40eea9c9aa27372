"""A checkpoint is a copy of its step, written in a thread, one at a time."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from cifar_dist.distributed.context import DistContext
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    find_corruption,
    load_optimizer,
    load_tensors,
)
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.state import TrainState, poll_ranks
from cifar_dist.utils.precision import make_scaler

ALONE, CPU = DistContext(0, 1, None), torch.device("cpu")
KEPT: dict[str, Any] = {"keep": 2, "metadata": {"micro_batches": 1}}


@pytest.fixture
def state() -> TrainState:
    model = torch.nn.Linear(3, 2)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(OptimConfig(name="adamw", lr=0.1), model),
        scaler=make_scaler("fp32", CPU),
        average=None,
        window=MetricWindow(["loss"], micro_batches=1, device=CPU),
    )
    update(state)
    return state


def update(state: TrainState) -> None:
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.step += 1


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, state: TrainState
) -> None:
    weights = state.model.weight.detach().clone()
    moments = state.optimizer.state[state.model.weight]["exp_avg"].clone()
    gate = Event()
    state.writer.submit(gate.wait)  # a slow disk: the one thread that writes is busy
    state.save(tmp_path, ALONE, **KEPT)
    for _ in range(3):
        update(state)
    assert not checkpoints(tmp_path)
    gate.set()
    state.finish_saving(ALONE)
    (saved,) = checkpoints(tmp_path)
    assert saved.name == "step_00000001"
    assert find_corruption(saved) is None
    assert torch.equal(load_tensors(saved, "model")["weight"], weights)
    assert torch.equal(load_optimizer(saved)["state"][0]["exp_avg"], moments)
    assert not torch.equal(state.model.weight, weights)


def test_checkpoints_are_written_in_order(tmp_path: Path, state: TrainState) -> None:
    for _ in range(4):
        state.save(tmp_path, ALONE, **KEPT)
        earlier = state.writing
        assert earlier is not None
        update(state)
    state.finish_saving(ALONE)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


def test_failed_write_is_reported_at_the_next_poll(tmp_path: Path, state: TrainState) -> None:
    place = tmp_path / "checkpoints"
    place.write_text("a file where the folder should be")
    state.save(place, ALONE, **KEPT)
    while not state.checkpoint_failed:
        pass
    _, save_now, _ = poll_ranks(state, ALONE, save_every_minutes=60)
    assert save_now
    with pytest.raises(OSError, match="checkpoints"):
        state.save(place, ALONE, **KEPT)


def test_finish_saving_without_a_checkpoint_returns_at_once(state: TrainState) -> None:
    state.finish_saving(ALONE)
    assert not state.checkpoint_failed
