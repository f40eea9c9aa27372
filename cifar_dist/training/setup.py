"""Build everything that a training needs, at step 0 or from the newest checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import (
    Batch,
    BatchPlan,
    num_steps_per_epoch,
    train_batches,
)
from cifar_dist.data.dataset import (
    Split,
    class_names,
    classes_digest,
    data_digest,
    open_splits,
    read_image_size,
)
from cifar_dist.data.streaming import stream_images
from cifar_dist.data.training_rows import describe_rows, training_data
from cifar_dist.distill.teacher import ShardOver, Teacher, TeacherWeights, build_teacher
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext, rank_mesh
from cifar_dist.distributed.tree_sum import is_exact
from cifar_dist.evaluation.evaluator import EvalResult, evaluate
from cifar_dist.losses.classification import balanced_weights
from cifar_dist.losses.registry import logit_scale
from cifar_dist.models.backbones import fetch_pretrained
from cifar_dist.models.classifier import build_model
from cifar_dist.models.freeze import find_unfreeze_epochs, freeze
from cifar_dist.models.preprocess import whitening_filters
from cifar_dist.optim.averaging import build_average
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.optim.schedule import learning_rate
from cifar_dist.recipe.schema import Recipe, to_dict, to_yaml
from cifar_dist.recipe.session import resolve_precision
from cifar_dist.recipe.teachers import check_caches, check_teacher, find_teacher
from cifar_dist.run_folder.checkpoint import load_tensors
from cifar_dist.run_folder.records import MetricsFile
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.training.albumentations_workers import AlbumentationsWorkers, albumentations_workers
from cifar_dist.training.environment import describe_environment
from cifar_dist.training.lock import run_lock
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.start import Start, check_world_size, claim_folder, find_start, log_session
from cifar_dist.training.state import TrainState
from cifar_dist.utils.log import log, progress_bar
from cifar_dist.utils.precision import make_scaler
from cifar_dist.utils.random import derive_seed

WHITENING_PIXELS = 2000 * 32**2  # of the first images; whitening filters are computed from them


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is constant in this process while a recipe trains."""

    recipe: Recipe
    accelerator: Accelerator
    context: DistContext
    micro_batches: int
    train_split: Split
    test_split: Split
    rows: Tensor  # int64, rows of the train split to train on
    val_rows: Tensor | None  # int64, rows of the train split for validation
    steps_per_epoch: int
    total_steps: int
    objective: Objective
    batches: Iterator[list[Batch]]  # of this rank, from the first remaining step
    albumentations_workers: AlbumentationsWorkers | None
    unfreeze_epochs: Mapping[str, int | None]  # by parameter name
    metrics_file: MetricsFile
    tracker: Tracker
    bar: tqdm
    is_new_folder: bool  # on rank 0: this process created the run folder
    metadata: dict[
        str, Any
    ]  # stored with each checkpoint; the next start compares data and teachers

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        return learning_rate(
            self.recipe.optim,
            step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    def evaluate(
        self,
        state: TrainState,
        split: Split,
        rows: Tensor | None = None,
        *,
        stoppable: bool = False,
    ) -> EvalResult:
        """Evaluate the model, or its average if there is one, on rows of a split (default: all).

        If `stoppable`, a stop signal raises EvaluationStoppedError.
        """
        return evaluate(
            state.evaluated_model,
            split,
            torch.arange(len(split.labels)) if rows is None else rows,
            precision=self.recipe.run.precision,
            logit_scale=logit_scale(self.recipe.losses.values()),
            context=self.context,
            stoppable=stoppable,
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run starts from, equal on all ranks."""

    data_digest: str
    teachers: list[TeacherWeights]
    start: Start
    micro_batches: int
    num_classes: int
    classes: str  # digest of the class names
    environment: dict[str, Any]


def setup(
    recipe: Recipe, accelerator: Accelerator, stack: ExitStack, *, fork: Path | None = None
) -> tuple[Run, TrainState]:
    """Build the run and its state. Resources to close are entered into `stack`.

    `fork` is the folder of a run to start from. UserError on all ranks if the run cannot start.
    """
    context, device = DistContext.of(accelerator), accelerator.device
    recipe = resolve_precision(recipe, context, device)
    log_session(recipe, context, device)
    is_new_folder = not recipe.folder.exists()
    context.run_on_main(stack.enter_context, run_lock(recipe.folder))
    origin = find_origin(recipe, context, device, fork)
    start = origin.start

    data = recipe.data
    original_split, test_split, check_data = open_splits(
        Path(data.path), device, data.place, data.labels
    )
    selected = training_data(data, original_split)
    train_split, rows = selected.split, selected.rows
    steps_per_epoch = num_steps_per_epoch(len(rows), recipe.run.batch_size)
    total_steps = recipe.run.epochs * steps_per_epoch

    model = build_initial_model(recipe, origin, context, train_split.images, rows).to(device)
    model.to(memory_format=torch.channels_last)
    teacher = build_teachers(recipe, origin, context, device)
    batches_of = partial(rank_batches, recipe, origin, context, rows)
    workers = stack.enter_context(
        albumentations_workers(recipe.augment, train_split, context, recipe.run.epochs)
    )
    streamed = stack.enter_context(stream_images(recipe.augment, train_split, rows, batches_of))
    augment = Augment(recipe.augment, train_split, rows, image_source=workers or streamed)
    class_weights = None
    if any(loss.balances_classes for loss in recipe.losses.values()):
        class_weights = balanced_weights(train_split.labels[rows.to(device)], origin.num_classes)
    objective = Objective(augment, recipe.losses, teacher, class_weights=class_weights)
    freeze(
        model, recipe.model.freeze, epoch=None
    )  # everything that ever trains gets optimizer state
    unfreeze_epochs = find_unfreeze_epochs(model, recipe.model.freeze)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(recipe.optim, model, unfreeze_epochs),
        scaler=make_scaler(recipe.run.precision, device),
        average=build_average(
            recipe.averaging,
            model,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            first_step=0
            if start.fork is None or start.fork.keeps_average
            else start.fork.start_step,
        ),
        window=MetricWindow(objective.names, micro_batches=origin.micro_batches, device=device),
    )
    stack.callback(state.writer.shutdown)  # after an error: finish writing
    if start.is_resumed:
        assert start.checkpoint
        state.restore(start.checkpoint, context)
    elif start.fork:
        state.start_fork(start.fork)
    signals.save_on_interrupt()
    context.run_on_main(claim_folder, recipe, origin.environment, start)
    if recipe.run.compile:
        model.compile()
    metrics_file = MetricsFile(recipe.folder / "metrics.jsonl")
    last_evaluation = context.run_on_main(metrics_file.truncate, state.step, state.evaluated_step)
    state.evaluated_step = min(state.evaluated_step, last_evaluation)  # repeat a lost one
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        context=context,
        micro_batches=origin.micro_batches,
        train_split=train_split,
        test_split=test_split,
        rows=rows,
        val_rows=selected.val_rows,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        objective=objective,
        batches=batches_of(train_split),
        albumentations_workers=workers,
        unfreeze_epochs=unfreeze_epochs,
        metrics_file=metrics_file,
        tracker=start_tracker(recipe, origin, context),
        bar=stack.enter_context(progress_bar(state.step, total_steps, enabled=context.is_main)),
        is_new_folder=is_new_folder,
        metadata={
            "micro_batches": origin.micro_batches,
            "data": origin.data_digest,
            "classes": origin.classes,
            "teachers": [teacher.digest for teacher in origin.teachers],
            "world_size": context.world_size,
            "origin": asdict(start.fork) if start.fork else None,
        },
    )
    log.info(
        f"{recipe.name}: {recipe.model.backbone}, {len(rows):,} rows, {recipe.run.epochs} epochs of "
        f"{steps_per_epoch} steps, batch size {recipe.run.batch_size} in {origin.micro_batches} "
        "micro-batch(es)"
        + (f"; resuming from step {state.step} of {total_steps}" if start.is_resumed else "")
    )
    if description := describe_rows(data, original_split, selected):
        log.info(f"training data: {description}")
    if recipe.run.reduction == "exact" and not is_exact(origin.micro_batches, context.world_size):
        log.info(
            f"{context.world_size} processes give the results of one up to rounding; 1, 2, 4, 8, ... or "
            f"{origin.micro_batches} give the same bits"
        )
    if train_split.image_size > recipe.model.image_size:
        log.info(
            f"the images have {train_split.image_size} px, the model {recipe.model.image_size} px "
            "(model.image_size): they are shrunk"
        )
    check_data()  # digests were computed by threads meanwhile
    return run, state


def find_origin(
    recipe: Recipe, context: DistContext, device: torch.device, fork: Path | None
) -> Origin:
    """Agree on recipe, data, teachers and checkpoint; UserError if ranks disagree."""
    digest = data_digest(Path(recipe.data.path))
    context.require_equal("recipe", hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12])
    context.require_equal("data set", digest[:12])
    teachers = context.run_on_main(find_teacher_weights, recipe)
    context.run_on_main(check_caches, recipe, teachers)
    digests = [teacher.digest for teacher in teachers]
    names = class_names(Path(recipe.data.path), recipe.data.labels)
    start = context.run_on_main(find_start, recipe, data=digest, teachers=digests, fork=fork)
    micro_batches = start.micro_batches or recipe.run.micro_batches or context.world_size
    check_world_size(recipe, micro_batches=micro_batches, world_size=context.world_size)
    return Origin(
        data_digest=digest,
        teachers=teachers,
        start=start,
        micro_batches=micro_batches,
        num_classes=len(names),
        classes=classes_digest(names),
        environment=describe_environment(
            world_size=context.world_size,
            device=device,
            data=digest,
            image_size=read_image_size(Path(recipe.data.path)),
            teachers=digests,
            origin=asdict(start.fork) if start.fork else None,
        ),
    )


def find_teacher_weights(recipe: Recipe) -> list[TeacherWeights]:
    teachers = [find_teacher(teacher) for teacher in recipe.all_teachers]
    for config, teacher in zip(recipe.all_teachers, teachers, strict=True):
        check_teacher(config, teacher, Path(recipe.data.path), recipe.data.labels)
    return teachers


def build_initial_model(
    recipe: Recipe, origin: Origin, context: DistContext, images: Tensor, rows: Tensor
) -> Any:
    """Return the model on the CPU, with initial, pretrained or saved weights."""
    saved = origin.start.checkpoint
    if saved is None:
        context.run_on_main(fetch_pretrained, recipe.model)
    torch.manual_seed(derive_seed("weights", recipe.run.seed))
    weights = load_tensors(saved, "model") if saved else None
    model: Any = build_model(recipe.model, origin.num_classes, weights)
    if saved is None and recipe.model.whiten:
        few = images[rows[: WHITENING_PIXELS // images.shape[-1] ** 2]].cpu()
        model.preprocess.filters.copy_(
            context.run_on_main(whitening_filters, model.preprocess, few)
        )
    return model


def build_teachers(
    recipe: Recipe, origin: Origin, context: DistContext, device: torch.device
) -> Teacher | None:
    """Return the recipe's teachers as one, or None; log how many parameters each rank holds."""

    def mesh(over: ShardOver) -> DeviceMesh | None:
        return rank_mesh(device, context.world_size, over=over)

    teacher = build_teacher(
        recipe.all_teachers,
        origin.teachers,
        num_classes=origin.num_classes,
        device=device,
        mesh=mesh,
    )
    if teacher and teacher.local_num_params:
        held = " ".join(context.all_gather_object(f"{teacher.local_num_params:,}"))
        log.info(f"the teacher's parameters on each rank: {held}")
    return teacher


def rank_batches(
    recipe: Recipe, origin: Origin, context: DistContext, rows: Tensor, split: Split
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step, from the first remaining step."""
    return train_batches(
        split,
        rows,
        BatchPlan(
            seed=recipe.run.seed,
            shuffle=recipe.data.shuffle,
            batch_size=recipe.run.batch_size,
            micro_batches=origin.micro_batches,
            rank=context.rank,
            world_size=context.world_size,
            repeated=recipe.augment.repeated,
        ),
        start_step=origin.start.step,
    )


def start_tracker(recipe: Recipe, origin: Origin, context: DistContext) -> Tracker:
    tracker = Tracker()
    if context.is_main:
        settings, environment = to_dict(recipe), origin.environment
        tracker.start(recipe.tracking, recipe.folder, settings, environment, recipe.all_teachers)
    return tracker
