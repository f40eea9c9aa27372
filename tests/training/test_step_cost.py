"""Guard the cost of a step on the CPU: no host waits and no work per image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from emulated_recorder import EmulatedRecorder
from measure import ratios, take_turns
from peers import endless, hugging_face_loader, tutorial_loader
from step_cost import ALL_OPS, BATCH_SIZE, CROP_FLIP, GPU, PRETENDED, Waits, batches_of, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distill.teacher import OnlineTeacher
from cifar_dist.distributed.tree_sum import GradientTree
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.registry import LOSSES
from cifar_dist.optim.averaging import AveragingConfig, Ema
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer, set_learning_rate
from cifar_dist.training.graphed_step import GraphedStep
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective, sum_terms
from cifar_dist.training.step import StepConfig, StepResult, optimizer_step, train_step
from cifar_dist.utils.precision import Precision, make_scaler

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_waits_are_counted() -> None:
    numbers = torch.arange(4.0)
    with Waits() as waits:
        numbers.sum()
        assert waits.count == 0
        numbers.sum().item()
        assert waits.count == 1
        bool(numbers[0] > 0)
        assert waits.count == 2
        numbers.nonzero()
        assert waits.count == 3
    with PRETENDED, Waits() as waits:
        torch.zeros(4, device=GPU).cpu()
        torch.zeros(4).to(GPU)
        assert waits.count == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_step_reads_no_number(data: Path, optimizer_name: str, precision: Precision) -> None:
    """Nothing between two logs waits for the device."""
    accelerator = Accelerator(cpu=True)
    split = load_split(data, "train", accelerator.device)
    config = OptimConfig(name=optimizer_name, lr=0.01, max_grad_norm=5.0)
    model = model_of(CrossEntropy())
    objective = Objective(Augment(ALL_OPS, split), {"cross_entropy": CrossEntropy()})
    optimizer = build_optimizer(config, model)
    scaler = make_scaler(precision, accelerator.device)
    ema, batches = Ema(AveragingConfig(), model), batches_of(split)
    window = MetricWindow(objective.names, micro_batches=2, device=accelerator.device)
    tree = GradientTree(list(model.parameters()), 1)
    with Waits() as waits:
        for step in range(5):
            set_learning_rate(optimizer, 0.01 / (1 + step))
            result = train_step(
                accelerator,
                model,
                objective,
                optimizer,
                scaler,
                StepConfig(
                    precision=precision,
                    seed=0,
                    batch_size=BATCH_SIZE,
                    max_grad_norm=config.max_grad_norm,
                ),
                next(batches),
                step=step,
                tree=tree,
            )
            window.add(result)
            ema.update(model, step + 1)
    assert waits.count == 0
    assert window.read()[0][-2] > 0


@pytest.mark.parametrize("loss", [make() for make in LOSSES.values()], ids=LOSSES)
@pytest.mark.parametrize("augment", [CROP_FLIP, ALL_OPS], ids=["crop and flip", "all operations"])
def test_step_copies_nothing_to_or_from_the_device(loss: Loss, augment: AugmentConfig) -> None:
    """No blocking copy from step 2 of an epoch on.

    On a fake GPU, whose tensors have no values, without the backward.
    """
    with PRETENDED:
        with GPU:
            model = model_of(loss)
            teacher = OnlineTeacher(model_of(loss).eval(), 1.0) if loss.needs_teacher else None
            images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
            split = Split(images=images, labels=torch.zeros(64, dtype=torch.int64))
        objective = Objective(Augment(augment, split), {"loss_of_the_recipe": loss}, teacher)
        optimizer = build_optimizer(OptimConfig(max_grad_norm=5.0), model)
        scaler = make_scaler("fp32", images.device)
        window = MetricWindow(objective.names, micro_batches=2, device=images.device)
        batches = batches_of(split)
        counts = []
        for _ in range(2):
            with Waits() as waits:
                set_learning_rate(optimizer, 0.01)
                terms = [sum_terms(objective(model, micro_batch)) for micro_batch in next(batches)]
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                skipped = optimizer_step(model, optimizer, scaler, grad_scale=1, max_grad_norm=5.0)
                window.add(StepResult(slice(0, None), torch.stack(terms), skipped))
            counts.append(waits.count)
    assert counts[0] > 0, "the order and the table of the epoch go to the device"
    assert counts[1] == 0


class Operations(TorchDispatchMode):
    """Counts operations that would be kernels on a GPU: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        fresh = "empty" in str(function) or "detach" in str(function)
        if not function.is_view and not fresh:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (AugmentConfig(), 3),  # images, labels, which view each is
        (CROP_FLIP, 4),  # where a crop begins, the crop
        (AugmentConfig(crop_padding=4, hflip="alternate", cutout=8), 29),
        (AugmentConfig(crop_padding=4, hflip=True, mixup=0.2), 29),  # and its partner
    ],
    ids=["nothing", "crop and flip", "and cutout", "and mixup"],
)
def test_augmentation_takes_few_operations(data: Path, config: AugmentConfig, most: int) -> None:
    split = load_split(data, "train")
    augment, batches = Augment(config, split), batches_of(split, micro_batches=1)
    augment(next(batches)[0])  # draws the epoch's tables
    (batch,) = next(batches)
    with Operations() as operations:
        augment(batch)
    assert len(operations.names) <= most, operations.names


@pytest.mark.parametrize("augment", [CROP_FLIP, ALL_OPS], ids=["crop and flip", "all operations"])
def test_graphed_step_reads_no_number_and_launches_few_operations(
    data: Path, augment: AugmentConfig
) -> None:
    """Single launches: copy of the rows, learning rate, sums of the window."""
    split = load_split(data, "train")
    model = model_of(CrossEntropy())
    objective = Objective(Augment(augment, split), {"cross_entropy": CrossEntropy()})
    optimizer = build_optimizer(OptimConfig(name="sgd", max_grad_norm=1.0), model)
    step = GraphedStep(
        model,
        objective,
        optimizer,
        StepConfig(precision="bf16", seed=0, batch_size=BATCH_SIZE, max_grad_norm=1.0),
        device=CPU,
        world_size=1,
        new_recorder=EmulatedRecorder,  # type: ignore[arg-type]
    )
    batches, window = batches_of(split), MetricWindow(objective.names, micro_batches=2, device=CPU)
    for number in range(4):
        window.add(step(next(batches), step=number))
    with Waits() as waits, Operations() as loose:
        set_learning_rate(optimizer, 0.1)
        window.add(step(next(batches), step=4))
    assert waits.count == 0
    assert len(loose.names) <= 20, loose.names


def test_no_recompilation_after_the_first_steps(data: Path) -> None:
    """Micro-batches of two sizes and another learning rate in each step, across epochs."""
    import torch._dynamo

    torch._dynamo.reset()
    accelerator = Accelerator(cpu=True)
    split = load_split(data, "train")
    model = model_of(CrossEntropy())
    model.compile(backend="eager")  # what is compiled, and when, does not depend on by what
    objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
    optimizer = build_optimizer(OptimConfig(), model)
    scaler, batches = make_scaler("bf16", accelerator.device), batches_of(split, micro_batches=3)

    def take(step: int) -> None:
        set_learning_rate(optimizer, 0.01 / (1 + step))
        train_step(
            accelerator,
            model,
            objective,
            optimizer,
            scaler,
            StepConfig(precision="bf16", seed=0, batch_size=BATCH_SIZE, max_grad_norm=None),
            next(batches),
            step=step,
            tree=tree,
        )

    tree = GradientTree(list(model.parameters()), 1)
    take(0)
    take(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 6):
            take(step)


def test_fused_adamw_reads_no_number() -> None:
    model = model_of(CrossEntropy())
    parameters = list(model.parameters())
    ours = build_optimizer(OptimConfig(name="adamw"), model)
    foreach = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    counts = {}
    for name, optimizer in {"ours": ours, "foreach": foreach}.items():
        with Waits() as waits:
            optimizer.step()
        counts[name] = waits.count
    assert counts["ours"] == 0
    assert counts["foreach"] >= len(parameters)


def test_data_path_is_many_times_faster_than_per_item_loading(middle_data: Path) -> None:
    """By CPU time; measured: 30 times the tutorial's loader, 40 times with augmentation."""
    split = load_split(middle_data, "train")
    plain, augmented = (batches_of(split, batch_size=250, micro_batches=1) for _ in range(2))
    augment = Augment(CROP_FLIP, split)
    tutorial = endless(tutorial_loader(split, 250))
    hugging_face = endless(hugging_face_loader(split, 250, augment=True))
    turns = take_turns(
        {
            "tutorial": lambda: len(next(tutorial)[1]),
            "ours": lambda: len(next(plain)[0].labels),
            "Hugging Face, augmented": lambda: len(next(hugging_face)[1]),
            "ours, augmented": lambda: len(augment(next(augmented)[0]).labels),
        },
        rounds=5,
        seconds=0.05,
    )
    for ours, peer in ("ours", "tutorial"), ("ours, augmented", "Hugging Face, augmented"):
        times = ratios(turns, ours, peer)["by_cpu"]["median"]
        assert times > 5, f"{ours}: only {times:.1f} times {peer}"
