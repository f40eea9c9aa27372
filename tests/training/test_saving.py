"""A checkpoint is a copy of its step, written beside the training, one at a time."""

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
KEPT: dict[str, Any] = {"keep": 2, "facts": {"micro_batches": 1}}


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


def test_training_goes_on_while_its_past_is_written(tmp_path: Path, state: TrainState) -> None:
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


def test_one_is_written_at_a_time_and_in_order(tmp_path: Path, state: TrainState) -> None:
    for _ in range(4):
        state.save(tmp_path, ALONE, **KEPT)
        earlier = state.writing
        assert earlier is not None
        update(state)
    state.finish_saving(ALONE)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


def test_a_write_that_fails_is_told_at_the_next_vote_not_at_the_next_save(
    tmp_path: Path, state: TrainState
) -> None:
    place = tmp_path / "checkpoints"
    place.write_text("a file where the folder should be")
    state.save(place, ALONE, **KEPT)
    while not state.checkpoint_failed:
        pass
    _, save_now, _ = poll_ranks(state, ALONE, save_every_minutes=60)
    assert save_now
    with pytest.raises(OSError, match="checkpoints"):
        state.save(place, ALONE, **KEPT)


def test_nothing_written_yet_is_nothing_to_wait_for(state: TrainState) -> None:
    state.finish_saving(ALONE)
    assert not state.checkpoint_failed
