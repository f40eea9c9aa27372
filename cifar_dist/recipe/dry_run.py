"""Estimate what a recipe costs without running it: `train --dry-run`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_dist.data.augment.albumentations_pipeline import Pipeline
from cifar_dist.data.augment.augmentation import check_image_size
from cifar_dist.data.augment.padded_images import padded_bytes
from cifar_dist.data.batches import num_steps_per_epoch
from cifar_dist.data.dataset import (
    Place,
    class_names,
    no_superclasses_error,
    read_image_size,
    read_labels,
)
from cifar_dist.data.ingest.archive import CIFAR_100
from cifar_dist.data.ingest.preparation import find_published
from cifar_dist.data.training_rows import select_rows
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.models.classifier import Classifier, ModelConfig, build_model, num_parameters
from cifar_dist.models.freeze import find_unfreeze_epochs, freeze
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.recipe.estimate import (
    activation_bytes,
    estimate,
    optimizer_states,
)
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_dict, to_yaml
from cifar_dist.recipe.session import format_precision, keep_precision
from cifar_dist.utils.precision import Precision, auto_precision
from cifar_dist.utils.units import format_duration, human_readable


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe with its defaults, and its cost."""

    recipe: dict[str, Any]
    run_folder: str
    precision: Precision  # `auto` resolved for this machine
    parameters: int
    forward_flops_per_image: int
    teacher_flops_per_image: int
    training_flops: int
    unknown_teachers: list[str]  # run folders that do not exist yet: their cost is not included
    steps_per_epoch: int
    total_steps: int
    rows_per_micro_batch: int
    memory_bytes: int  # of one process, a lower bound
    data_bytes: int
    data_place: Place
    steps_per_second: float | None  # measured with --time, for the processes of this launch

    def __str__(self) -> str:
        teacher = ""
        if self.teacher_flops_per_image:
            teacher = f" and {human_readable(self.teacher_flops_per_image)} for the teacher"
        if self.unknown_teachers:
            names = ", ".join(self.unknown_teachers)
            teacher += f" (without {names}: not there yet)"
        place = " on the host" if self.data_place == "host" else ""
        duration = ""
        if self.steps_per_second:
            length = format_duration(self.total_steps / self.steps_per_second)
            images = self.steps_per_second * self.recipe["run"]["batch_size"]
            duration = (
                f"time              about {length} at {images:,.0f} images/s, without evaluations\n"
            )
        return (
            f"{to_yaml(self.recipe)}\n"
            f"precision         {format_precision(self.recipe['run']['precision'], self.precision)}\n"
            f"parameters        {self.parameters:,}\n"
            f"FLOPs per image   {human_readable(self.forward_flops_per_image)} forward{teacher}, "
            f"{human_readable(self.training_flops)} for the whole training\n"
            f"steps             {self.total_steps // self.steps_per_epoch} epochs x "
            f"{self.steps_per_epoch} = {self.total_steps:,}\n"
            f"memory            at least {self.memory_bytes / 2**30:.2f} GiB per process "
            f"({self.rows_per_micro_batch} rows per micro-batch), and "
            f"{self.data_bytes / 2**30:.2f} GiB of data{place}\n"
            f"{duration}run folder        {self.run_folder}"
        )


def describe(recipe: Recipe, steps_per_second: float | None = None) -> Plan:
    """Return the cost of a recipe without computing anything; UserError if it cannot take a step.

    `steps_per_second` is the measured speed, if there is one.
    """
    run, data = recipe.run, Path(recipe.data.path)
    precision = keep_precision(recipe).run.precision
    if precision == "auto":
        precision = auto_precision(
            torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        )
    has_data = (data / "digest.json").exists()
    classes = num_classes(recipe)
    labels = torch.arange(50_000) % classes
    if has_data:
        labels = read_labels(data, "train", recipe.data.labels)
    rows, _ = select_rows(recipe.data, labels)
    steps = num_steps_per_epoch(len(rows), run.batch_size)
    micro_batches = run.micro_batches or 1
    # SAM takes two passes, and keeps the weights and the first gradient besides the second one.
    passes = 2 if recipe.optim.sam else 1
    states = optimizer_states(recipe.optim) + 2 * (passes - 1)
    configs, unknown = online_teachers(recipe)
    model = meta_model(recipe.model, classes)
    freeze(model, recipe.model.freeze, epoch=None)
    build_optimizer(recipe.optim, model, find_unfreeze_epochs(model, recipe.model.freeze))
    check_augment(recipe)
    teachers = [meta_model(config, classes) for config in configs]
    with FakeTensorMode(allow_non_fake_inputs=True):
        cost = estimate(
            model.to_empty(device="cpu"),
            batch_size=run.batch_size,
            micro_batches=micro_batches,
            states=states,
            averaging=recipe.averaging is not None,
            half=precision != "fp32",
        )
        forward = forward_flops(recipe, model, cost["forward_flops_per_image"])
        teacher_flops = sum(activation_bytes(one.to_empty(device="cpu"))[1] for one in teachers)
    return Plan(
        recipe=to_dict(recipe),
        run_folder=str(recipe.folder),
        precision=precision,
        parameters=cost["parameters"],
        forward_flops_per_image=cost["forward_flops_per_image"],
        teacher_flops_per_image=teacher_flops,
        # The backward costs two forwards; a teacher has none and runs once per step.
        training_flops=steps * run.batch_size * (3 * passes * forward + run.epochs * teacher_flops),
        unknown_teachers=unknown,
        steps_per_epoch=steps,
        total_steps=run.epochs * steps,
        rows_per_micro_batch=-(-run.batch_size // micro_batches),
        memory_bytes=cost["memory_bytes"] + 4 * sum(num_parameters(one) for one in teachers),
        data_bytes=data_bytes(recipe, len(labels)),
        data_place=recipe.data.place,
        steps_per_second=steps_per_second,
    )


def forward_flops(recipe: Recipe, model: Classifier, at_full_size: int) -> int:
    """Return the forward FLOPs of one image, summed over all epochs with their image sizes."""
    epochs_at = Counter(recipe.model.train_size(epoch) for epoch in range(recipe.run.epochs))
    total = epochs_at.pop(recipe.model.image_size, 0) * at_full_size
    for size, epochs in epochs_at.items():
        model.train_size = size
        total += epochs * activation_bytes(model)[1]
    return total


def data_bytes(recipe: Recipe, rows: int) -> int:
    """Return the size of images and labels, with the padded copies that crops are cut from."""
    image_size, augment = expected_image_size(recipe), recipe.augment
    size = rows * (3 * image_size**2 + 20)
    if recipe.data.place == "device" and augment.crops_or_flips and not augment.albumentations:
        size += padded_bytes(
            rows,
            image_size=image_size,
            padding=augment.crop_padding,
            mirrored=bool(augment.hflip),
        )
    return size


def num_classes(recipe: Recipe) -> int:
    """Return the number of classes of the recipe's data, or of its source if they are missing."""
    path, labels = Path(recipe.data.path), recipe.data.labels
    if (path / "digest.json").exists():
        return len(class_names(path, labels))
    published = find_published(recipe.data.source) or CIFAR_100
    if labels not in published.num_classes:
        raise no_superclasses_error(published.name)
    return published.num_classes[labels]


def expected_image_size(recipe: Recipe) -> int:
    """Return the size of the images of the recipe's data, or that of CIFAR if they are missing."""
    path = Path(recipe.data.path)
    return read_image_size(path) if (path / "digest.json").exists() else 32


def check_augment(recipe: Recipe) -> None:
    """Raise UserError if the augmentation does not suit the images."""
    size = expected_image_size(recipe)
    check_image_size(recipe.augment, size)
    if recipe.augment.albumentations:
        Pipeline(recipe.augment.albumentations, image_size=size)


def meta_model(config: ModelConfig, num_classes: int) -> Classifier:
    """The model on the meta device: shapes only, so the largest costs nothing.

    timm may read a few numbers while it builds; FakeTensorMode then stands in for a CPU.
    """
    with torch.device("meta"):
        return build_model(replace(config, pretrained=False, weights=None), num_classes)


def online_teachers(recipe: Recipe) -> tuple[list[ModelConfig], list[str]]:
    """Return the models that run in each step, and the run folders that do not exist yet."""
    online = [teacher for teacher in recipe.all_teachers if teacher.placement != "cached"]
    models = [(teacher.run, teacher_model(teacher)) for teacher in online]
    known = [model for _, model in models if model is not None]
    return known, [run for run, model in models if model is None]


def teacher_model(config: TeacherConfig) -> ModelConfig | None:
    recipe = Path(config.run) / "recipe.yaml"
    if config.model is None and recipe.is_file():
        return load_recipe(recipe).model
    return config.model
