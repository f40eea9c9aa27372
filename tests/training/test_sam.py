"""SAM and ASAM against manual updates, side effects of the second pass, and other world sizes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from compare import assert_same_bits, largest_difference
from launcher import train
from restarts import kill_and_resume
from steps import CPU, micro_batches_of, model_of, plain_objective
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch
from cifar_dist.distributed.tree_sum import GradientTree
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.distillation import Distill
from cifar_dist.optim.sam import SamConfig
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import (
    StepConfig,
    StepResult,
    bn_stats_enabled,
    seed_dropout,
    train_step,
)
from cifar_dist.utils.precision import Precision, make_scaler
from recipes import RecipeMaker, TeacherMaker, with_teachers

SAM, ASAM = SamConfig(rho=0.1), SamConfig(rho=0.5, adaptive=True)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def step(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: list[Batch],
    *,
    sam: SamConfig | None,
    objective: Objective | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float | None = None,
) -> StepResult:
    return train_step(
        accelerator,
        model,
        objective or plain_objective(micro_batches[0].split),
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
        scaler or make_scaler(precision, CPU),
        StepConfig(
            precision=precision,
            seed=0,
            batch_size=sum(len(micro_batch.rows) for micro_batch in micro_batches),
            max_grad_norm=max_grad_norm,
            sam=sam,
        ),
        micro_batches,
        step=0,
        tree=GradientTree(list(model.parameters()), accelerator.num_processes),
    )


def gradient(
    model: nn.Module, micro_batch: Batch, precision: Precision = "fp32"
) -> dict[str, Tensor]:
    """Return the gradient of the summed cross-entropy of a micro-batch by name; updates statistics."""
    model.zero_grad()
    seed_dropout(CPU, seed=0, step=0, micro_batch=micro_batch.micro_batch)
    with (
        bn_stats_enabled(model, micro_batch.micro_batch == 0),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        logits = model(micro_batch.images).logits
    nn.functional.cross_entropy(logits.float(), micro_batch.labels, reduction="sum").backward()
    actual = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        actual[name] = parameter.grad.clone()
    return actual


def by_hand(
    model: nn.Module, micro_batches: list[Batch], sam: SamConfig, **options: Any
) -> nn.Module:
    """Apply one manual SGD update at 0.1 with the mean of each micro-batch's perturbed gradient."""
    total: dict[str, Tensor] = {}
    for micro_batch in micro_batches:
        first = gradient(copy.deepcopy(model), micro_batch, **options)
        size = {name: torch.ones_like(value) for name, value in first.items()}
        if sam.adaptive:
            for name, weight in model.named_parameters():
                if name.endswith("weight"):
                    size[name] = weight.detach().abs() + 0.01
        length = torch.cat([(size[name] * first[name]).flatten() for name in first]).norm()
        above = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in above.named_parameters():
                parameter.add_(size[name] ** 2 * first[name], alpha=sam.rho / length.item())
        for name, value in gradient(above, micro_batch, **options).items():
            total[name] = total.get(name, torch.zeros(())) + value
    rows = sum(len(micro_batch.rows) for micro_batch in micro_batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(total[name], alpha=0.1 / rows)
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return nn.utils.get_total_norm([(a - b).detach() for a, b in pairs]).item()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("sam", [SAM, ASAM], ids=["sam", "asam"])
def test_update_matches_a_manual_computation(
    accelerator: Accelerator, data: Path, sam: SamConfig, micro_batches: int
) -> None:
    """A ViT with dropout: it is smooth, and both passes must drop the same activations."""
    parts = micro_batches_of(data, micro_batches=micro_batches)
    model = model_of(backbone="test_vit", drop_rate=0.2)
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    wanted = by_hand(copy.deepcopy(model), parts, sam)
    step(accelerator, model, parts, sam=sam)
    step(accelerator, plain, parts, sam=None)
    for name, ours in model.named_parameters():
        theirs = wanted.get_parameter(name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-6)
    assert distance(model, plain) > 0.02 * distance(model, start)  # uphill is somewhere else


def test_bf16_uses_the_perturbed_weights(accelerator: Accelerator, data: Path) -> None:
    """Autocast caches cast weights: both passes in one context would use the same ones."""
    parts = micro_batches_of(data, micro_batches=2)
    model = model_of(backbone="test_vit")
    plain = copy.deepcopy(model)
    wanted = by_hand(copy.deepcopy(model), parts, SAM, precision="bf16")
    step(accelerator, plain, parts, sam=None, precision="bf16")
    step(accelerator, model, parts, sam=SAM, precision="bf16")
    assert distance(model, wanted) < 0.2 * distance(plain, wanted)


@pytest.mark.parametrize("sam", [SAM, ASAM], ids=["sam", "asam"])
def test_weights_are_restored_exactly(accelerator: Accelerator, data: Path, sam: SamConfig) -> None:
    """With learning rate 0 only micro-batch 0's statistics of the first pass may change."""
    parts = micro_batches_of(data, micro_batches=2)
    model = model_of()
    first_only = copy.deepcopy(model)
    step(accelerator, model, parts, sam=sam, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    first_only(parts[0].images)
    for (name, ours), theirs in zip(
        model.state_dict().items(), first_only.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_terms_are_those_of_the_unperturbed_weights(accelerator: Accelerator, data: Path) -> None:
    parts = micro_batches_of(data, micro_batches=2)
    model = model_of(drop_rate=0.2)
    plain = step(accelerator, copy.deepcopy(model), parts, sam=None)
    result = step(accelerator, model, parts, sam=replace(SAM, rho=5.0))
    assert torch.equal(result.sums, plain.sums)
    assert not result.sums.requires_grad


def test_perturbed_gradient_is_clipped(accelerator: Accelerator, data: Path) -> None:
    model = model_of()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(accelerator, model, micro_batches_of(data, micro_batches=2), sam=SAM, max_grad_norm=0.5)
    change = [now - then for now, then in zip(model.parameters(), before, strict=True)]
    assert nn.utils.get_total_norm(change).item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_teacher_runs_once_per_micro_batch(accelerator: Accelerator, data: Path) -> None:
    class Counts:
        asked = 0
        local_num_params = 0
        capturable = True

        def __call__(self, view: Any, batch: Batch) -> Tensor:
            self.asked += 1
            return torch.zeros(len(batch.rows), 100)

    teacher = Counts()
    losses: dict[str, Loss] = {"cross_entropy": CrossEntropy(), "distill": Distill()}
    micro_batches = micro_batches_of(data, micro_batches=3)
    objective = Objective(Augment(AugmentConfig(), micro_batches[0].split), losses, teacher)
    step(accelerator, model_of(), micro_batches, sam=SAM, objective=objective)
    assert teacher.asked == 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [torch.inf, 1e30])  # each finite, but not their norm
@pytest.mark.parametrize("broken", [0, 1])
def test_nonfinite_gradient_of_either_pass_is_skipped(
    accelerator: Accelerator, data: Path, broken: int, factor: float, fused: bool
) -> None:
    model = model_of()
    passes = 0

    def break_one(gradient: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return gradient * factor if passes == 2 + broken else gradient  # of the second micro-batch

    parts = micro_batches_of(data, micro_batches=2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    head = model.get_submodule("head")
    handle = head.register_forward_hook(
        lambda module, inputs, outputs: outputs.logits.register_hook(break_one) and None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    passes = -1  # the first micro-batch's two come first
    assert step(accelerator, model, parts, sam=SAM, optimizer=optimizer).skipped
    handle.remove()
    assert passes == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not step(accelerator, model, parts, sam=SAM, optimizer=optimizer).skipped


def test_nonfinite_loss_is_noticed_with_zero_gradients(
    accelerator: Accelerator, data: Path
) -> None:
    """A nonfinite first gradient makes the second nonfinite, even if the loss hides it."""
    weight = nn.Parameter(torch.ones(2))
    with SAM.perturbed_weights([("weight", weight)], [torch.tensor([1.0, torch.inf])]) as sound:
        assert sound.isnan()
    assert torch.equal(weight, torch.ones(2))
    with SAM.perturbed_weights([("weight", weight)], [torch.zeros(2)]) as sound:
        assert sound == 1
        assert torch.equal(weight, torch.ones(2))


def test_fp16_overflow_is_handled_by_the_scaler(accelerator: Accelerator, data: Path) -> None:
    """Normalized gradients do not depend on the loss scale."""
    parts = micro_batches_of(data, micro_batches=2)
    model = model_of(backbone="test_vit")
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    result = step(accelerator, model, parts, sam=SAM, precision="fp16", scaler=scaler)
    assert result.skipped
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    actual = []
    for scale in (2.0**12, 2.0**14):
        one = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert not step(accelerator, one, parts, sam=SAM, precision="fp16", scaler=scaler).skipped
        actual.append(one)
    wanted = by_hand(copy.deepcopy(model), parts, SAM)
    for name, ours in actual[0].named_parameters():
        torch.testing.assert_close(ours, actual[1].get_parameter(name), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours, wanted.get_parameter(name), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("precision", "adaptive"),
    [("fp32", True), pytest.param("bf16", True, marks=pytest.mark.fault), ("fp16", False)],
)
def test_one_and_two_processes_have_the_same_bits(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, precision: str, adaptive: bool
) -> None:
    """With a teacher and EMA; one micro-batch per process, so the DDP graph is static."""
    teacher("taught_by")
    path = recipe(
        run={"precision": precision, "epochs": 2},
        optim={"sam": {"rho": 0.2, "adaptive": adaptive}},
        **with_teachers("taught_by"),
    )
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert_same_bits(tmp_path / "runs/w1", tmp_path / "runs/w2")
    train(path, "name=plain", "optim.sam=null", cwd=tmp_path)
    assert largest_difference(tmp_path / "runs/w1", tmp_path / "runs/plain") > 1e-3


def test_four_micro_batches_agree_up_to_rounding(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two processes with two micro-batches each: the first under no_sync."""
    path = recipe(
        run={"micro_batches": 4, "epochs": 2},
        model={"backbone": "test_vit"},
        optim={"name": "sgd", "lr": 0.01, "sam": {"rho": 0.05}},
    )
    for world_size in (1, 2):
        train(path, f"name=w{world_size}", cwd=tmp_path, world_size=world_size)
    assert largest_difference(tmp_path / "runs/w1", tmp_path / "runs/w2") < 1e-5


@pytest.mark.fault  # one such run with kills is in test_all_at_once.py
def test_killed_run_matches_an_uninterrupted_run(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two kills mid-epoch (6 steps per epoch) and mid-window (5 steps per log)."""
    path = recipe(run={"epochs": 8}, optim={"sam": {"rho": 0.1}})
    train(path, "name=straight", cwd=tmp_path)
    kill_and_resume(path, tmp_path, [4, 15], last_step=48)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")
