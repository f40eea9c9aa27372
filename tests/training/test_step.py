"""The step against manual updates: scaling, statistics, clipping, nonfinite values, dropout keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from steps import CPU, micro_batches_of, model_of, plain_objective
from timm.optim import create_optimizer_v2
from torch import nn

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch
from cifar_dist.distributed.tree_sum import GradientTree
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.heads import Outputs
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig, StepResult, seed_dropout, train_step
from cifar_dist.utils.config import config
from cifar_dist.utils.precision import Precision, check_precision, make_scaler


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    max_grad_norm: float | None = None,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> StepResult:
    return train_step(
        accelerator,
        model,
        plain_objective(micro_batches[0].split),
        optimizer,
        scaler or make_scaler(precision, CPU),
        StepConfig(
            precision=precision,
            seed=0,
            batch_size=sum(len(micro_batch.rows) for micro_batch in micro_batches),
            max_grad_norm=max_grad_norm,
        ),
        micro_batches,
        step=0,
        tree=GradientTree(list(model.parameters()), accelerator.num_processes),
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_update_matches_the_manual_mean_loss(
    accelerator: Accelerator, data: Path, micro_batches: int, max_grad_norm: float | None
) -> None:
    parts = micro_batches_of(data, micro_batches=micro_batches)
    model = model_of()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    result = step(accelerator, model, optimizer, parts, max_grad_norm=max_grad_norm)
    assert not result.skipped

    loss = torch.zeros(())
    for part in parts:
        logits = by_hand(part.images).logits
        loss = loss + nn.functional.cross_entropy(logits, part.labels, reduction="sum")
    (loss / 10).backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(by_hand.parameters(), max_grad_norm)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-5, atol=1e-6)


def test_running_statistics_follow_micro_batch_zero(accelerator: Accelerator, data: Path) -> None:
    parts = micro_batches_of(data, micro_batches=3)
    model = model_of()
    first_only = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(accelerator, model, optimizer, parts)
    first_only(parts[0].images)
    for (name, ours), theirs in zip(model.named_buffers(), first_only.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(
        module.track_running_stats
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    )


def test_dropout_depends_on_seed_step_and_micro_batch() -> None:
    dropout = nn.Dropout(0.5)
    ones = torch.ones(1000)

    def mask(**key: Any) -> torch.Tensor:
        torch.rand(7)  # ambient randomness must not matter
        seed_dropout(CPU, **key)
        return dropout(ones)

    base = mask(seed=0, step=5, micro_batch=1)
    assert torch.equal(base, mask(seed=0, step=5, micro_batch=1))
    for other in (
        {"seed": 1, "step": 5, "micro_batch": 1},
        {"seed": 0, "step": 6, "micro_batch": 1},
    ):
        assert not torch.equal(base, mask(**other))
    assert not torch.equal(base, mask(seed=0, step=5, micro_batch=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
        lambda parameters: create_optimizer_v2(parameters, "lamb", lr=0.1),
        lambda parameters: create_optimizer_v2(parameters, "muon", lr=0.1),
    ],
    ids=["fused sgd", "fused adamw", "not fused", "lamb", "muon"],
)
def test_nonfinite_gradient_is_skipped(
    accelerator: Accelerator, data: Path, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = model_of()
    optimizer = make(model.parameters())
    parts = micro_batches_of(data, micro_batches=2)
    step(accelerator, model, optimizer, parts)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    handle = model.get_submodule("head").register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * torch.nan,)
    )
    assert step(accelerator, model, optimizer, parts, max_grad_norm=1.0).skipped
    handle.remove()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[0][name]), name
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][index][name]))
    assert not step(accelerator, model, optimizer, parts).skipped


def test_fp16_overflow_is_handled_by_the_scaler(accelerator: Accelerator, data: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(model.state_dict())
    parts = micro_batches_of(data, micro_batches=2)
    result = step(accelerator, model, optimizer, parts, precision="fp16", scaler=scaler)
    assert result.skipped
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    skips = 0
    while step(accelerator, model, optimizer, parts, precision="fp16", scaler=scaler).skipped:
        skips += 1
    assert 10 < skips < 40


def test_fp16_clips_unscaled_gradients(accelerator: Accelerator, data: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    before = copy.deepcopy(list(model.parameters()))
    scaler, parts = (
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
        micro_batches_of(data, micro_batches=2),
    )
    result = step(
        accelerator, model, optimizer, parts, max_grad_norm=0.5, precision="fp16", scaler=scaler
    )
    assert not result.skipped
    moved = [old - new for old, new in zip(before, model.parameters(), strict=True)]
    # the gradient is longer than 0.5, and clipped to it
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.1 * 0.5, rel=1e-3)


@config
class Endless(CrossEntropy):
    """A nonfinite loss with a finite gradient."""

    def __call__(
        self, outputs: Outputs, labels: torch.Tensor, teacher_logits: Any = None
    ) -> torch.Tensor:
        return super().__call__(outputs, labels, teacher_logits) + torch.inf


def test_nonfinite_loss_with_finite_gradient_is_skipped(
    accelerator: Accelerator, data: Path
) -> None:
    model, parts = model_of(), micro_batches_of(data, micro_batches=2)
    before = copy.deepcopy(list(model.parameters()))
    result = train_step(
        accelerator,
        model,
        Objective(Augment(AugmentConfig(), parts[0].split), {"endless": Endless()}),
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
        make_scaler("fp32", CPU),
        StepConfig(precision="fp32", seed=0, batch_size=10, max_grad_norm=None),
        parts,
        step=0,
        tree=GradientTree(list(model.parameters()), accelerator.num_processes),
    )
    assert result.skipped
    assert all(map(torch.equal, model.parameters(), before))


def test_step_returns_summed_terms(accelerator: Accelerator, data: Path) -> None:
    parts = micro_batches_of(data, micro_batches=3)
    model = model_of()
    objective, before = plain_objective(parts[0].split), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = step(accelerator, model, optimizer, parts)
    assert result.micro_batches == slice(0, None, 1)
    for part, sums in zip(parts, result.sums, strict=True):
        terms = objective(before, part)
        assert list(terms) == ["cross_entropy", "loss", "top1"] == objective.names
        for term, total in zip(terms.values(), sums, strict=True):
            assert term.shape == (len(part.rows),)
            assert term.dtype == torch.float32
            assert torch.equal(term.sum(), total)
    assert not result.sums.requires_grad


def test_cpu_takes_every_precision() -> None:
    for precision in ("bf16", "fp16", "fp32"):
        check_precision(precision, CPU)
