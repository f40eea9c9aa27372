"""The step that a GPU records computes what `train_step` under DDP computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, largest_difference
from conftest import RecipeMaker, TeacherMaker, taught
from ranks import Ranks, train
from test_speed import model_of

from cifar_dist.engine.capture import (
    WARM_UP,
    CapturedStep,
    Piece,
    flat_gradients,
    why_by_hand,
)
from cifar_dist.engine.runtime import log
from cifar_dist.errors import UserError
from cifar_dist.learn.losses import CrossEntropy
from cifar_dist.learn.optim import (
    OptimConfig,
    build_optimizer,
    keep_scalars_on_device,
    saved_state,
    set_learning_rate,
)
from cifar_dist.learn.sam import SamConfig
from cifar_dist.nets.backbones import ModelConfig, build_model

CPU = torch.device("cpu")


def captured(path: Path, *arguments: str, cwd: Path, world_size: int = 1) -> None:
    ranks = Ranks("captured_train", [path, *arguments], cwd=cwd, world_size=world_size)
    assert ranks.wait() == [0] * world_size, ranks.output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_has_the_same_bits_with_either_step(
    tmp_path: Path, recipe: RecipeMaker, world_size: int, precision: str
) -> None:
    """Three shards of unlike size, partners, dropout, an average; two of three shards on rank 0."""
    path = recipe(
        run={"shards": 3, "precision": precision},
        model={"drop_rate": 0.1, "growing": {"start": 32, "epochs": 2}, "image_size": 64},
    )
    train(path, "name=plain", cwd=tmp_path, world_size=world_size)
    captured(path, "name=captured", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")


def test_a_taught_and_partly_frozen_run_has_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """A loss that warms up and layers that learn later: both are other recordings."""
    teacher("big", image_size=48)
    sections: dict[str, Any] = taught("big")
    sections["losses"]["distill"]["warmup_epochs"] = 3
    path = recipe(
        model={"freeze": [{"pattern": "backbone.*", "until_epoch": 2}]},
        optim={"name": "sgd", "lr": 0.01},
        **sections,
    )
    train(path, "name=plain", cwd=tmp_path)
    captured(path, "name=captured", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")


def test_gradients_in_bf16_are_reduced_alike_and_are_others(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"reduce_precision": "bf16", "epochs": 1}, optim={"name": "sgd", "lr": 0.005})
    train(path, "name=plain", cwd=tmp_path, world_size=2)
    captured(path, "name=captured", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")
    train(path, "name=exact", "run.reduce_precision=fp32", cwd=tmp_path, world_size=2)
    assert 0 < largest_difference(tmp_path / "runs/plain", tmp_path / "runs/exact") < 0.05


@pytest.mark.fault
def test_a_compiled_run_computes_the_same_but_for_rounding(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """By inductor, a minute of compilation; both kinds of step."""
    path = recipe(run={"epochs": 1}, optim={"name": "sgd", "lr": 0.005}, model={"drop_rate": 0.0})
    train(path, "name=plain", cwd=tmp_path)
    for name, run in ("compiled", train), ("both", captured):
        run(path, f"name={name}", "run.compile=true", cwd=tmp_path)
        difference = largest_difference(tmp_path / "runs/plain", tmp_path / f"runs/{name}")
        assert difference < 1e-4, name


def test_gradients_lie_in_one_tensor_with_their_parameters_strides() -> None:
    model = model_of(CrossEntropy()).to(memory_format=torch.channels_last)
    frozen = next(model.parameters()).requires_grad_(False)
    flat = flat_gradients(model)
    assert frozen.grad is None
    for parameter in model.parameters():
        if parameter is not frozen:
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            parameter.grad.fill_(1)
    learning = sum(p.numel() for p in model.parameters() if p is not frozen)
    assert int(flat.sum()) == learning, "no two of them share a number"


def test_scalars_on_the_device_are_saved_like_those_on_the_host() -> None:
    optimizer = build_optimizer(OptimConfig(name="adamw"), model_of(CrossEntropy()))
    before = saved_state(optimizer)
    keep_scalars_on_device(optimizer, CPU)
    set_learning_rate(optimizer, 0.25)
    assert all(torch.equal(g["lr"], torch.tensor(0.25)) for g in optimizer.param_groups)
    after = saved_state(optimizer)
    assert [group.keys() for group in after["param_groups"]] == [
        group.keys() for group in before["param_groups"]
    ]
    assert after["param_groups"][0]["lr"] == 0.25
    assert after["param_groups"][0]["capturable"] is before["param_groups"][0]["capturable"]
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor), "only the copy is plain"


def test_what_cannot_be_recorded_says_why() -> None:
    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    sgd = build_optimizer(OptimConfig(name="sgd"), model)
    assert why_by_hand(model, sgd, precision="bf16", sam=None) is None
    lamb = build_optimizer(OptimConfig(name="lamb"), model)
    two_sizes = build_model(ModelConfig(backbone="test_resnet", second_size=48), 100)
    slim = build_model(ModelConfig(backbone="test_vit", grad_checkpointing=True), 100)
    assert "fp16" in str(why_by_hand(model, sgd, precision="fp16", sam=None))
    assert "sam" in str(why_by_hand(model, sgd, precision="bf16", sam=SamConfig()))
    assert "Lamb" in str(why_by_hand(model, lamb, precision="bf16", sam=None))
    assert "second_size" in str(why_by_hand(two_sizes, sgd, precision="bf16", sam=None))
    assert "checkpointing" in str(why_by_hand(slim, sgd, precision="bf16", sam=None))


class Pretender:
    """Records without a GPU: does the work again at each replay, into the results of the first time."""

    device = CPU

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.warm_ups, self.replays = fails, 0, 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.warm_ups += 1
        yield

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError("the CPU tensor is not pinned\nmore")
        results = torch.zeros(())

        def replay() -> None:
            self.replays += 1
            results.copy_(work())

        return replay, results


class Adder:
    """Work that adds a random number to a counter, as dropout would."""

    def __init__(self) -> None:
        self.counter = torch.zeros(())

    def __call__(self) -> torch.Tensor:
        return self.counter.add_(torch.rand(()))

    def written(self) -> list[torch.Tensor]:
        return [self.counter]


def totals(piece: Piece[torch.Tensor], work: Adder) -> list[float]:
    torch.manual_seed(0)
    return [float(piece(work, work.written)) for _ in range(6)]


def test_a_piece_is_eager_then_recorded_and_compared_once_then_replayed() -> None:
    pretender = Pretender()
    found = totals(Piece(pretender), Adder())  # type: ignore[arg-type]
    assert found == totals(Piece(None), Adder()), "no call adds twice or draws other numbers"
    assert (pretender.warm_ups, pretender.replays) == (WARM_UP + 1, 3)


def test_a_recording_that_fails_cleanly_leaves_the_step_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    found = totals(Piece(Pretender(fails=True)), Adder())  # type: ignore[arg-type]
    assert found == totals(Piece(None), Adder())
    (record,) = {id(record): record for record in caplog.records}.values()  # seen twice, it may be
    message = record.getMessage()
    assert "the step stays eager: recording failed (the CPU tensor is not pinned)" in message
    assert "more" not in message


class Forgetful(Pretender):
    """Replays half of the work."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, results = super().record(lambda: work().mul_(0.5))
        return replay, results


def test_a_replay_that_differs_from_the_eager_step_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"differs from the eager step by 0\.5.*run\.graph=off"):
        totals(Piece(Forgetful()), Adder())  # type: ignore[arg-type]


def test_a_step_is_freed_with_its_last_reference() -> None:
    """Without the garbage collector: a recording's memory must not outlive a thaw."""
    model = model_of(CrossEntropy())
    step = CapturedStep(
        model,
        None,  # type: ignore[arg-type]
        build_optimizer(OptimConfig(name="sgd"), model),
        device=CPU,
        world_size=1,
        precision="fp32",
        seed=0,
        batch_size=2,
        max_grad_norm=None,
        reduce_precision="fp32",
        recorder=None,
    )
    freed = weakref.ref(step.update)
    gc.disable()
    try:
        del step
        assert freed() is None
    finally:
        gc.enable()
