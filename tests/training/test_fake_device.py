"""The step of every recipe on a small network of its family and a fake device.

Forward, backward, update, metric window and averaging run on fake tensors of torch's "lazy" device, which have
shapes, strides and a device but no values. From the second step of an epoch on, nothing may copy between
devices or read a number. Autocast is left out: torch has none for that device.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from all_recipes import RECIPES, ROOT, SMALL
from step_cost import Waits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import BatchPlan, train_batches
from cifar_dist.data.dataset import Split
from cifar_dist.distill.teacher import OnlineTeacher
from cifar_dist.models.classifier import build_model
from cifar_dist.models.freeze import find_unfreeze_epochs, freeze
from cifar_dist.optim.averaging import build_average
from cifar_dist.optim.optimizer import build_optimizer, make_capturable, set_learning_rate
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.training import graphed_step, step
from cifar_dist.training.graphed_step import GraphedStep, unsupported_reason
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.step import StepConfig

DEVICE = torch.device("lazy", 0)
ROWS, MICRO_BATCHES = 64, 2


class WaitsOnOneDevice(Waits):
    """`Waits` that replaces fused optimizers, which have no fake implementation."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "_fused_" not in str(function):
            return super().__torch_dispatch__(function, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device for tensor in tensors} == {DEVICE}
        parameters, gradients = args[:2]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.stride() == gradient.stride()
        return None


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch and the step accept the lazy device."""

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    supported = torch_optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(
        torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported(), "lazy"]
    )
    monkeypatch.setattr(torch, "autocast", nothing)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    for module in (step, graphed_step):
        monkeypatch.setattr(module, "autocast", nothing)
    monkeypatch.setattr(step, "device_generator", lambda device: torch.default_generator)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)


def on_device(model: nn.Module) -> nn.Module:
    """Return the model with its tensors replaced by fake ones."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return model


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_steps_never_wait_for_the_device(pretended: None, path: Path) -> None:
    changes = ["model.pretrained=false", "model.grad_checkpointing=false"]  # no lazy device has it
    written = load_recipe(ROOT / path, changes).model
    small = next(small for name, small in SMALL.items() if written.backbone.startswith(name))
    changes += [f"model.backbone={small}", f"model.image_size={min(written.image_size, 64)}"]
    changes += ["model.progressive_resize=null"]  # its sizes are the real network's
    recipe = load_recipe(ROOT / path, changes)
    with torch.device("meta"):
        network = build_model(recipe.model, 100).to(memory_format=torch.channels_last)
    needs_teacher = any(loss.needs_teacher for loss in recipe.losses.values())
    teacher = copy.deepcopy(network).eval() if needs_teacher else None
    with FakeTensorMode():
        take_three_steps(recipe, network, teacher)


def take_three_steps(recipe: Recipe, network: nn.Module, teacher_model: nn.Module | None) -> None:
    augment = replace(
        recipe.augment, albumentations=None
    )  # the host's part is a wait by its nature
    batch_size = 4 * MICRO_BATCHES  # two at each size of model.mixed_resolution
    images = torch.zeros(ROWS, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    split = Split(images=images, labels=torch.zeros(ROWS, dtype=torch.int64, device=DEVICE))
    teacher = OnlineTeacher(on_device(teacher_model), 1.0) if teacher_model else None
    model: Any = on_device(network)
    objective = Objective(Augment(augment, split), recipe.losses, teacher)
    freeze(model, recipe.model.freeze, epoch=None)
    optimizer = build_optimizer(
        recipe.optim, model, find_unfreeze_epochs(model, recipe.model.freeze)
    )
    freeze(model, recipe.model.freeze, epoch=0)
    average = build_average(recipe.averaging, model, steps_per_epoch=1, total_steps=10**6)
    window = MetricWindow(objective.names, micro_batches=MICRO_BATCHES, device=DEVICE)
    batches = train_batches(
        split,
        torch.arange(ROWS),
        BatchPlan(
            seed=0,
            shuffle=True,
            batch_size=batch_size,
            micro_batches=MICRO_BATCHES,
            repeated=augment.repeated,
        ),
        start_step=0,
    )
    take_step = GraphedStep(
        model,
        objective,
        optimizer,
        StepConfig(
            precision="fp32",
            seed=0,
            batch_size=batch_size,
            max_grad_norm=recipe.optim.max_grad_norm,
        ),
        device=DEVICE,
        world_size=1,
        new_recorder=None,
    )
    config = StepConfig(
        precision="bf16", seed=0, batch_size=batch_size, max_grad_norm=None, sam=recipe.optim.sam
    )
    reason = unsupported_reason(model, optimizer, config, torch.device("cuda"))
    if reason is None:
        make_capturable(optimizer, DEVICE)
    else:  # the update of such a step reads a number, so it is left out
        take_step.update_weights = lambda gradients: (  # type: ignore[method-assign]
            torch.zeros((), dtype=torch.bool, device=DEVICE),
            torch.stack([one.sums for one in gradients]),
        )
    model.train_size = recipe.model.train_size(0)
    counts = []
    for number in range(3):
        with WaitsOnOneDevice() as waits:
            set_learning_rate(optimizer, 0.1 / (1 + number))
            window.add(take_step(next(batches), step=number))
            if average:
                average.update(model, number + 1)
        counts.append(waits.count)
    assert counts[0] > 0, "the order and the tables of the epoch go to the device"
    if reason is None:
        assert counts[1:] == [0, 0]
