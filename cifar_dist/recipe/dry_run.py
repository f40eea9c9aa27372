"""Floor 5. What `train --dry-run` prints: a recipe with its defaults, and what it will cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_dist.data.augment.albumentations_pipeline import Pipeline
from cifar_dist.data.augment.padded_images import canvas_bytes
from cifar_dist.data.batches import check_holdout, count_steps
from cifar_dist.data.dataset import class_names, read_digest
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.models.backbones import Classifier, ModelConfig, build_model, num_parameters
from cifar_dist.models.freeze import first_epochs, freeze
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.recipe.estimate import activation_bytes, estimate, optimizer_states, readable
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_yaml


def plan(recipe: Recipe) -> str:
    """The resolved recipe, parameters, FLOPs, steps, memory, run folder; computes nothing.

    UserError where not a step could be made.
    """
    run, data = recipe.run, Path(recipe.data.path)
    is_there = (data / "digest.json").exists()
    rows = read_digest(data)["train"]["rows"] if is_there else 50_000
    check_holdout(
        recipe.data.holdout, classes=len(class_names(data)) if is_there else 100, rows=rows
    )
    steps = count_steps(rows - recipe.data.holdout, run.batch_size)
    shards = run.shards or 1
    passes = 2 if recipe.optim.sam else 1
    # SAM keeps the weights, and has its first gradient beside the second's.
    states = optimizer_states(recipe.optim) + 2 * (passes - 1)
    epochs_at = Counter(recipe.model.train_size(epoch) for epoch in range(run.epochs))
    teachers, unknown = live_teachers(recipe)
    model = unfilled(recipe.model)
    freeze(model, recipe.model.freeze, epoch=None)
    build_optimizer(recipe.optim, model, first_epochs(model, recipe.model.freeze))
    if recipe.augment.host:
        Pipeline(recipe.augment.host)
    guides = [unfilled(teacher) for teacher in teachers]
    with FakeTensorMode(allow_non_fake_inputs=True):
        numbers = estimate(
            model.to_empty(device="cpu"),
            batch_size=run.batch_size,
            shards=shards,
            states=states,
            ema=recipe.ema is not None,
            half=run.precision != "fp32",
        )
        whole = numbers["forward_flops_per_image"]
        forward = epochs_at.pop(recipe.model.image_size, 0) * whole  # summed over the epochs
        for size, epochs in epochs_at.items():
            model.train_size = size
            forward += epochs * activation_bytes(model)[1]
        guiding = sum(activation_bytes(guide.to_empty(device="cpu"))[1] for guide in guides)
    # The backward costs two forwards; a teacher has none, and is asked once.
    training = steps * run.batch_size * (3 * passes * forward + run.epochs * guiding)
    held = 4 * sum(num_parameters(guide) for guide in guides)
    taught = f" and {readable(guiding)} of the teacher's" if guides else ""
    if unknown:
        taught += f", without what {unknown} costs, which is not there yet"
    place, pictures = " on the host", rows * 3092
    if recipe.data.place == "device":
        place, augment = "", recipe.augment
        moved = augment.moves and not augment.host
        pictures += (
            canvas_bytes(rows, padding=augment.crop_padding, mirrored=bool(augment.flip))
            if moved
            else 0
        )
    return (
        f"{to_yaml(recipe)}\n"
        f"parameters        {numbers['parameters']:,}\n"
        f"FLOPs an image    {readable(whole)} forward{taught}, "
        f"{readable(training)} in the whole training\n"
        f"steps             {run.epochs} epochs of {steps} = {run.epochs * steps:,}\n"
        f"memory a process  at least {(numbers['memory_bytes'] + held) / 2**30:.2f} GiB "
        f"({-(-run.batch_size // shards)} rows a shard), and {pictures / 2**30:.2f} GiB of data{place}\n"
        f"run folder        {recipe.folder}"
    )


def unfilled(config: ModelConfig) -> Classifier:
    """The model on the meta device: shapes only, so the largest costs nothing.

    There timm may read the few numbers that it needs; later it pretends to be on the CPU, where autocast
    works.
    """
    with torch.device("meta"):
        return build_model(replace(config, pretrained=False, weights=None), 100)


def live_teachers(recipe: Recipe) -> tuple[list[ModelConfig], str]:
    """The models that are asked in each step, as far as they are known; who is not there yet, in words."""
    live = [teacher for teacher in recipe.taught_by if teacher.placement != "cached"]
    found = [(teacher, teacher_model(teacher)) for teacher in live]
    unknown = ", ".join(teacher.run for teacher, model in found if model is None)
    return [model for _, model in found if model is not None], unknown


def teacher_model(asked: TeacherConfig) -> ModelConfig | None:
    recipe = Path(asked.run) / "recipe.yaml"
    if asked.model is None and recipe.is_file():
        return load_recipe(recipe).model
    return asked.model
