"""The graphed step computes what `train_step` under DDP computes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from compare import assert_same_bits, largest_difference
from emulated_recorder import EmulatedRecorder
from launcher import Launch, train
from step_cost import batches_of, model_of

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.dataset import load_split
from cifar_dist.distill.teacher import OnlineTeacher
from cifar_dist.distributed.tree_sum import GradientTree
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.distillation import Distill
from cifar_dist.losses.margin import ArcFace
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.optim.optimizer import (
    OptimConfig,
    build_optimizer,
    make_capturable,
    portable_state_dict,
    set_learning_rate,
)
from cifar_dist.optim.sam import SamConfig
from cifar_dist.training.cuda_graphs import WARM_UP, GraphedCallable
from cifar_dist.training.graphed_step import GraphedStep, flat_gradients, unsupported_reason
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig, train_step
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log
from cifar_dist.utils.precision import Precision, make_scaler
from recipes import RecipeMaker, TeacherMaker, with_teachers

CPU = torch.device("cpu")


def captured(path: Path, *arguments: str, cwd: Path, world_size: int = 1) -> None:
    ranks = Launch("graphed_train", [path, *arguments], cwd=cwd, world_size=world_size)
    assert ranks.wait() == [0] * world_size, ranks.output


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_graphed_run_matches_eager_run(
    tmp_path: Path, recipe: RecipeMaker, world_size: int, precision: str
) -> None:
    """Three micro-batches of different sizes, mixing, dropout, EMA; two of three micro-batches on rank 0."""
    path = recipe(
        run={"micro_batches": 3, "precision": precision},
        model={
            "drop_rate": 0.1,
            "progressive_resize": {"start": 32, "epochs": 2},
            "image_size": 64,
        },
    )
    train(path, "name=plain", cwd=tmp_path, world_size=world_size)
    captured(path, "name=captured", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")


def test_graphed_run_with_teacher_and_freezing_matches_eager_run(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """Loss warm-up and unfreezing both invalidate the graphs."""
    teacher("big", image_size=48)
    sections: dict[str, Any] = with_teachers("big")
    sections["losses"]["distill"]["warmup_epochs"] = 3
    path = recipe(
        model={"freeze": [{"pattern": "backbone.*", "until_epoch": 2}]},
        optim={"name": "sgd", "lr": 0.01},
        **sections,
    )
    train(path, "name=plain", cwd=tmp_path)
    captured(path, "name=captured", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")


def test_bf16_reduction_matches_between_steps_and_differs_from_fp32(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(
        run={"grad_reduce_dtype": "bf16", "epochs": 1}, optim={"name": "sgd", "lr": 0.005}
    )
    train(path, "name=plain", cwd=tmp_path, world_size=2)
    captured(path, "name=captured", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/plain", tmp_path / "runs/captured")
    train(path, "name=exact", "run.grad_reduce_dtype=fp32", cwd=tmp_path, world_size=2)
    assert 0 < largest_difference(tmp_path / "runs/plain", tmp_path / "runs/exact") < 0.05


@pytest.mark.fault
def test_compiled_run_matches_up_to_rounding(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Uses inductor, which takes a minute."""
    path = recipe(run={"epochs": 1}, optim={"name": "sgd", "lr": 0.005}, model={"drop_rate": 0.0})
    train(path, "name=plain", cwd=tmp_path)
    for name, run in ("compiled", train), ("both", captured):
        run(path, f"name={name}", "run.compile=true", cwd=tmp_path)
        difference = largest_difference(tmp_path / "runs/plain", tmp_path / f"runs/{name}")
        assert difference < 1e-4, name


def test_flat_gradients_have_the_strides_of_their_parameters() -> None:
    model = model_of(CrossEntropy()).to(memory_format=torch.channels_last)
    frozen = next(model.parameters()).requires_grad_(False)
    flat, views = flat_gradients([p for p in model.parameters() if p.requires_grad])
    learning = [parameter for parameter in model.parameters() if parameter is not frozen]
    for parameter, view in zip(learning, views, strict=True):
        assert view.stride() == parameter.stride()
        view.fill_(1)
    count = sum(parameter.numel() for parameter in learning)
    assert int(flat.sum()) == count, "no two of them share a number"


def test_capturable_optimizer_state_is_portable() -> None:
    optimizer = build_optimizer(OptimConfig(name="adamw"), model_of(CrossEntropy()))
    before = portable_state_dict(optimizer)
    make_capturable(optimizer, CPU)
    set_learning_rate(optimizer, 0.25)
    assert all(torch.equal(g["lr"], torch.tensor(0.25)) for g in optimizer.param_groups)
    after = portable_state_dict(optimizer)
    assert [group.keys() for group in after["param_groups"]] == [
        group.keys() for group in before["param_groups"]
    ]
    assert after["param_groups"][0]["lr"] == 0.25
    assert after["param_groups"][0]["capturable"] is before["param_groups"][0]["capturable"]
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor), "only the copy is plain"


def test_unsupported_steps_give_a_reason() -> None:
    bf16 = StepConfig(precision="bf16", seed=0, batch_size=20, max_grad_norm=None)

    def reason(
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: StepConfig = bf16,
        device: str = "cuda",
    ) -> str | None:
        return unsupported_reason(model, optimizer, config, torch.device(device))

    model = build_model(ModelConfig(backbone="test_resnet"), 100)
    sgd = build_optimizer(OptimConfig(name="sgd"), model)
    assert reason(model, sgd) is None
    lamb = build_optimizer(OptimConfig(name="lamb"), model)
    two_sizes = build_model(ModelConfig(backbone="test_resnet", mixed_resolution=48), 100)
    slim = build_model(ModelConfig(backbone="test_vit", grad_checkpointing=True), 100)
    assert "this is cpu" in str(reason(model, sgd, device="cpu"))
    assert "fp16" in str(reason(model, sgd, replace(bf16, precision="fp16")))
    assert "sam" in str(reason(model, sgd, replace(bf16, sam=SamConfig())))
    assert "Lamb" in str(reason(model, lamb))
    assert "mixed_resolution" in str(reason(two_sizes, sgd))
    assert "checkpointing" in str(reason(slim, sgd))


def test_cuda_graphs_on_without_a_gpu_is_an_error(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(recipe(), "run.cuda_graphs=on", cwd=tmp_path, expect=2)
    assert "run.cuda_graphs=on: CUDA graphs need a GPU" in output


class Adder:
    """Adds a random number to a counter, like dropout."""

    def __init__(self) -> None:
        self.counter = torch.zeros(())

    def __call__(self) -> torch.Tensor:
        return self.counter.add_(torch.rand(())).clone()

    def written(self) -> list[torch.Tensor]:
        return [self.counter]


def totals(recorder: Any, work: Adder) -> list[float]:
    torch.manual_seed(0)
    recorded: GraphedCallable[torch.Tensor] = GraphedCallable(recorder)
    return [float(recorded(work, written=work.written)) for _ in range(6)]


def test_work_is_eager_then_captured_once_then_replayed() -> None:
    before = EmulatedRecorder.recordings
    actual = totals(EmulatedRecorder(CPU), Adder())
    assert actual == totals(None, Adder()), "no call adds twice or draws other numbers"
    assert EmulatedRecorder.recordings == before + 1


class Failing(EmulatedRecorder):
    def record(self, work: Callable[[], Any], *, own_pool: bool) -> Any:
        raise RuntimeError("the CPU tensor is not pinned\nmore")


def test_failed_capture_stays_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    assert totals(Failing(CPU), Adder()) == totals(None, Adder())
    (record,) = {id(record): record for record in caplog.records}.values()  # seen twice, it may be
    message = record.getMessage()
    assert "CUDA graphs: off, capturing failed (the CPU tensor is not pinned)" in message
    assert "more" not in message


class Forgetful(EmulatedRecorder):
    """Captures only half of the work."""

    def record(self, work: Callable[[], Any], *, own_pool: bool) -> Any:
        return super().record(lambda: work().mul_(0.5), own_pool=own_pool)


def test_replay_that_differs_from_eager_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"differs from the eager step by 0\.5.*run\.cuda_graphs=off"
    ):
        totals(Forgetful(CPU), Adder())


@pytest.mark.parametrize("draws", [True, False])
def test_only_deterministic_work_is_replayed_in_parallel(draws: bool) -> None:
    work = partial(torch.rand, ()) if draws else torch.zeros(()).clone
    recorder: Any = EmulatedRecorder(CPU)
    recorded: GraphedCallable[torch.Tensor] = GraphedCallable(recorder, parallel=True)
    for _ in range(WARM_UP + 1):
        recorded(work)
    assert recorded.parallel is not draws


def a_step(model: torch.nn.Module, objective: Any, new_recorder: Any) -> GraphedStep:
    return GraphedStep(
        model,
        objective,
        build_optimizer(OptimConfig(name="sgd"), model),
        StepConfig(precision="fp32", seed=0, batch_size=20, max_grad_norm=None),
        device=CPU,
        world_size=1,
        new_recorder=new_recorder,
    )


def test_step_is_freed_with_its_last_reference(data: Path) -> None:
    """Without the garbage collector: the memory of graphs is freed when layers unfreeze."""
    split = load_split(data, "train")
    objective = Objective(Augment(AugmentConfig(), split), {"cross_entropy": CrossEntropy()})
    step = a_step(model_of(CrossEntropy()), objective, EmulatedRecorder)
    batches = batches_of(split)
    for number in range(WARM_UP + 1):
        step(next(batches), step=number)
    freed = [
        weakref.ref(one) for one in (step.augment_graph, *step.learning_graphs, step.update_graph)
    ]
    gc.collect()
    gc.disable()
    try:
        del step
        assert [one() for one in freed] == [None] * 4
    finally:
        gc.enable()


def test_step_with_failed_capture_matches_eager_step(data: Path) -> None:
    """The update must not replay gradients that an eager micro-batch writes elsewhere each time."""
    split = load_split(data, "train")
    actual = []
    for recorder in (None, FailsOnce):
        FailsOnce.left = 1
        torch.manual_seed(0)
        model = model_of(CrossEntropy())
        objective = Objective(Augment(AugmentConfig(), split), {"cross_entropy": CrossEntropy()})
        step, batches = a_step(model, objective, recorder), batches_of(split)
        for number in range(8):
            step(next(batches), step=number)
        actual.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert FailsOnce.left == 0
    assert torch.equal(*actual)


class FailsOnce(EmulatedRecorder):
    left = 1

    def record(self, work: Callable[[], Any], *, own_pool: bool) -> Any:
        learns = isinstance(work, partial) and work.func.__name__ == "forward_backward"
        if learns and self.left:
            FailsOnce.left = 0
            raise RuntimeError("not while capturing")
        return super().record(work, own_pool=own_pool)


LEARNS = {"cross_entropy": CrossEntropy(label_smoothing=0.1)}
CASES: dict[str, dict[str, Any]] = {
    "resnet, sgd, bf16": {"optim": "sgd", "precision": "bf16"},
    "resnet, adamw, fp32": {"optim": "adamw"},
    "vit with drop path, adamw, bf16": {
        "backbone": "test_vit",
        "optim": "adamw",
        "precision": "bf16",
        "model": {"drop_path_rate": 0.1, "image_size": 64},
    },
    "convnext, adamw, bf16": {
        "backbone": "test_convnext",
        "optim": "adamw",
        "precision": "bf16",
        "model": {"drop_rate": 0.0},
    },
    "efficientnet, sgd": {"backbone": "test_efficientnet", "optim": "sgd"},
    "resnet8x1 without random draws, bf16": {
        "backbone": "resnet8x1",
        "optim": "sgd",
        "precision": "bf16",
        "model": {"drop_rate": 0.0},
    },
    "images too large to run in parallel, gradients added up at once": {
        "optim": "sgd",
        "model": {"drop_rate": 0.0, "image_size": 80},
    },
    "a teacher whose loss warms up": {
        "optim": "sgd",
        "losses": {
            "cross_entropy": CrossEntropy(weight=0.5),
            "distill": Distill(weight=0.5, warmup_epochs=2),
        },
    },
    "weighted classes": {
        "optim": "sgd",
        "losses": {"cross_entropy": CrossEntropy(class_weights="balanced")},
    },
    "arcface, adamw, bf16": {
        "optim": "adamw",
        "precision": "bf16",
        "losses": {"arcface": ArcFace()},
        "model": {"head": "cosine"},
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replayed_step_matches_eager_step(
    data: Path, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    """Three micro-batches of different sizes over three epochs: weights, statistics, momenta, sums."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    before = EmulatedRecorder.recordings
    eager, replayed = bits_after(data, None, **case), bits_after(data, EmulatedRecorder, **case)
    assert torch.equal(eager, replayed)
    assert EmulatedRecorder.recordings - before >= 5, "view, three micro-batches, update"


def bits_after(
    data: Path,
    recorder: Any,
    *,
    optim: str,
    precision: Precision = "fp32",
    backbone: str = "test_resnet",
    losses: dict[str, Any] = LEARNS,
    model: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Return all numbers after nine steps of `train_step`, or of a graphed step."""
    torch.manual_seed(0)
    split = load_split(data, "train")
    chosen: dict[str, Any] = {"backbone": backbone, "drop_rate": 0.1} | (model or {})
    config = ModelConfig(**chosen)
    network = build_model(config, 100).to(memory_format=torch.channels_last).train()
    needs_teacher = any(loss.needs_teacher for loss in losses.values())
    teacher = (
        OnlineTeacher(copy.deepcopy(network).eval().requires_grad_(False), 1.0)
        if needs_teacher
        else None
    )
    augment = Augment(AugmentConfig(crop_padding=4, hflip=True, mixup=0.2, cutmix=1.0), split)
    class_weights = torch.linspace(0.5, 2, 100)
    objective = Objective(augment, losses, teacher, class_weights=class_weights)
    optimizer = build_optimizer(OptimConfig(name=optim, weight_decay=2**-7), network)
    step_config = StepConfig(precision=precision, seed=0, batch_size=20, max_grad_norm=1.0)
    if recorder:
        take_step: Any = GraphedStep(
            network,
            objective,
            optimizer,
            step_config,
            device=CPU,
            world_size=1,
            new_recorder=recorder,
        )
    else:
        scaler = make_scaler(precision, CPU)
        accelerator = Accelerator(cpu=True)
        tree = GradientTree([p for p in network.parameters() if p.requires_grad], 1)
        take_step = partial(
            train_step, accelerator, network, objective, optimizer, scaler, step_config, tree=tree
        )
    window, batches = (
        MetricWindow(objective.names, micro_batches=3, device=CPU),
        batches_of(split, micro_batches=3),
    )
    for step in range(9):
        set_learning_rate(optimizer, 2.0 ** -(5 + step % 3))  # exact in float32
        window.add(take_step(next(batches), step=step))
    states = [value for state in optimizer.state.values() for value in state.values()]
    numbers = [*network.parameters(), *network.buffers(), window.sums]
    numbers += [value for value in states if isinstance(value, torch.Tensor)]
    return torch.cat([number.detach().double().flatten() for number in numbers])


class FailsToUpdate(EmulatedRecorder):
    def record(self, work: Callable[[], Any], *, own_pool: bool) -> Any:
        if isinstance(work, partial) and work.func.__name__ == "update_weights":
            raise RuntimeError("not while capturing")
        return super().record(work, own_pool=own_pool)


@pytest.mark.parametrize("recorder", [FailsOnce, FailsToUpdate])
def test_failed_capture_is_an_error_with_cuda_graphs_on(data: Path, recorder: Any) -> None:
    FailsOnce.left = 1
    split = load_split(data, "train")
    objective = Objective(Augment(AugmentConfig(), split), {"cross_entropy": CrossEntropy()})
    step, batches = a_step(model_of(CrossEntropy()), objective, recorder), batches_of(split)
    step.required = True
    for number in range(WARM_UP):
        step(next(batches), step=number)
    with pytest.raises(UserError, match=r"run\.cuda_graphs=on: capturing the step failed"):
        step(next(batches), step=WARM_UP)
