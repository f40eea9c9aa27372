"""Training and evaluation loops of other libraries, as their users write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from measure import Work
from ours import FewPixels
from peers import Batches
from torch import Tensor, nn

from cifar_dist.utils.precision import auto_precision, autocast

Loss = Callable[[Tensor, Tensor], Tensor]


def tuned_autocast(device: torch.device, tuned: bool) -> torch.autocast:
    return autocast(auto_precision(device) if tuned else "fp32", device)


def torch_loop(
    batches: Batches,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Loss,
    max_grad_norm: float | None = None,
    tuned: bool = False,
) -> Work:
    """Return the core loop of the tutorial (through Lightning) and of timm's train.py.

    `tuned` adds channels_last, and bf16 autocast where it is native, as timm's `--channels-last --amp
    --amp-dtype bfloat16`.
    """
    device = next(model.parameters()).device
    model.train()
    if tuned:
        model.to(memory_format=torch.channels_last)

    def step() -> int:
        images, labels = next(batches)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if tuned:
            images = images.contiguous(memory_format=torch.channels_last)
        with tuned_autocast(device, tuned):
            value = loss(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        return len(labels)

    return step


def tutorial_loop(batches: Batches, model: nn.Module) -> Work:
    """Return the tutorial's loop: fp32, AdamW at torch's defaults, gradients clipped to 5."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.001)
    return torch_loop(batches, model, optimizer, loss=nn.CrossEntropyLoss(), max_grad_norm=5.0)


def timm_loop(batches: Batches, model: nn.Module, *, tuned: bool = False) -> Work:
    """Return timm's default loop: SGD with momentum, label smoothing, fp32, no clipping."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=2e-5, momentum=0.9)
    return torch_loop(batches, model, optimizer, loss=LabelSmoothingCrossEntropy(0.1), tuned=tuned)


def accelerate_loop(
    accelerator: Accelerator, batches: Batches, model: nn.Module, *, tuned: bool = False
) -> Work:
    """Return Accelerate's usual loop; `tuned` adds channels_last, fused AdamW, and bf16 where it is native."""
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    prepared, optimizer = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.001, fused=tuned or None),
    )
    prepared.train()
    cross_entropy = nn.CrossEntropyLoss()

    def step() -> int:
        images, labels = next(batches)
        images, labels = images.to(accelerator.device), labels.to(accelerator.device)
        if tuned:
            images = images.contiguous(memory_format=torch.channels_last)
        with tuned_autocast(accelerator.device, tuned):
            loss = cross_entropy(prepared(images), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return len(labels)

    return step


def null_net(device: torch.device) -> nn.Module:
    """Return the null model of ours.py as a plain module."""
    return nn.Sequential(FewPixels(), nn.Linear(3, 100)).to(device)


def timm_net(device: torch.device, name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=100).to(device)


def torch_evaluation(
    batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module, *, tuned: bool = False
) -> Work:
    """Return an evaluation that reads one count per batch, as usual; the unit is an image.

    `tuned` adds channels_last, and bf16 autocast where it is native.
    """
    device = next(model.parameters()).device
    model.eval()
    if tuned:
        model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def evaluation() -> int:
        correct = total = 0
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            if tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            with tuned_autocast(device, tuned):
                logits = model(images)
            correct += int((logits.argmax(1) == labels).sum())
            total += len(labels)
        assert correct <= total
        return total

    return evaluation
