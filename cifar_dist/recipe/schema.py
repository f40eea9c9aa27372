"""Floor 4. YAML -> Recipe, strictly: what is not understood exactly is refused with a suggestion.

The only file that knows the validator. A recipe is made of the config classes of the floors below;
their defaults are the defaults, and there is no inheritance between recipes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.dataset import Place
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.distributed.ddp import GradReduceDtype
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import LOSSES, CrossEntropy
from cifar_dist.models.backbones import ModelConfig
from cifar_dist.optim.averaging import AveragingConfig
from cifar_dist.optim.optimizer import OptimConfig
from cifar_dist.tracking.tracker import TrackingConfig
from cifar_dist.utils.config import Count, Index, Positive, config
from cifar_dist.utils.precision import Precision

if TYPE_CHECKING:
    Losses = dict[str, Loss]
else:  # a key for each loss; one line in LOSSES is all that a new loss needs
    Losses = TypedDict("Losses", dict(LOSSES), total=False)  # noqa: UP013
    Losses.__pydantic_config__ = {"extra": "forbid"}


@config
class RunConfig:
    """How long, how large, how exact, and where to."""

    epochs: Count = 200
    batch_size: Count = 250  # global, whatever the number of processes
    micro_batches: Count | None = (
        None  # parts of the global batch; None: the first start's world size
    )
    precision: Precision = "bf16"
    seed: Index = 0
    output_dir: str = "runs"
    threads: Count | None = None  # CPU threads a process; None: the machine's, divided
    eval_every_epochs: Count = 1
    early_stopping_patience: Count | None = None  # in held-out accuracy, never in the test's
    save_every_minutes: Positive = 10.0
    log_every_steps: Count = 50
    keep_checkpoints: Count = 2
    compile: bool = False
    cuda_graphs: CudaGraphs = "auto"  # record the step and replay it; on: an error where that fails
    grad_reduce_dtype: GradReduceDtype = "fp32"  # in which ranks send each other gradients
    timeout_seconds: Count = 600  # how long a rank may keep the others waiting
    on_nonfinite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is NaN or infinite
    deterministic: bool = False  # the same bits twice on a GPU, at a price

    def __post_init__(self) -> None:
        if self.micro_batches is not None and self.micro_batches > self.batch_size:
            raise ValueError(
                f"micro_batches={self.micro_batches} is more than batch_size={self.batch_size} rows"
            )
        if self.timeout_seconds < 4:
            raise ValueError("timeout_seconds: a watch that looks each second needs 4 or more")

    @property
    def max_consecutive_skips(self) -> int:
        """Steps in a row that may be left out; fp16's scaler leaves some out when it grows."""
        return 20 if self.may_skip else 1

    @property
    def may_skip(self) -> bool:
        return self.on_nonfinite == "skip" or self.precision == "fp16"


@config
class DataConfig:
    """Where the Arrow data lie and what makes them when they are missing."""

    path: str = "data/cifar100"
    source: str | None = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    place: Place = "device"  # of the pictures; host: in the file's pages, fetched step by step
    shuffle: bool = True
    val_size: Index = 0  # rows of train, stratified by class, to choose hyper-parameters on


@config
class Recipe:
    """One experiment: all that decides its numbers, and the few things that do not."""

    name: str
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    averaging: AveragingConfig | None = None
    losses: Losses = dataclasses.field(default_factory=lambda: {"cross_entropy": CrossEntropy()})
    teacher: TeacherConfig | None = None  # short for a list of one
    teachers: tuple[TeacherConfig, ...] | None = None
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, '.', '_' and '-'")
        if not self.losses:
            raise ValueError("losses is empty; name at least one, like cross_entropy: {}")
        for name, loss in self.losses.items():
            if loss.head is not None and loss.head != self.model.head:
                raise ValueError(f"losses.{name} needs model.head={loss.head}")
            if loss.needs_teacher and not self.all_teachers:
                raise ValueError(f"losses.{name} needs a teacher: add teacher.run=runs/NAME")
            if self.augment.uses_mixing and not loss.supports_mixup:
                raise ValueError(
                    f"losses.{name} compares pictures of one label each: remove it, "
                    "or augment.mixup and augment.cutmix"
                )
        if not any(loss.trains_classifier and loss.weight for loss in self.losses.values()):
            raise ValueError(
                f"losses ({', '.join(self.losses)}): none with a weight teaches the classifier, so its "
                "accuracy would say nothing; add cross_entropy: {weight: 1.0}, or arcface with "
                "model.head=cosine"
            )
        if self.teacher and self.teachers:
            raise ValueError("teacher and teachers both say who teaches: remove one of them")
        if self.all_teachers and not any(loss.needs_teacher for loss in self.losses.values()):
            teacher_losses = ", ".join(name for name, kind in LOSSES.items() if kind.needs_teacher)
            raise ValueError(
                f"no loss listens to the teacher: add one of {teacher_losses}, or remove it"
            )

        if self.run.batch_size % self.augment.repeated:
            raise ValueError(
                f"augment.repeated={self.augment.repeated} does not divide "
                f"run.batch_size={self.run.batch_size}: change one of them"
            )
        if self.augment.repeated > 1 and not self.data.shuffle:
            raise ValueError(
                "augment.repeated would show the same part of the rows in each epoch where their order is "
                "fixed: remove it, or set data.shuffle"
            )
        if self.run.early_stopping_patience and not self.data.val_size:
            raise ValueError(
                "run.early_stopping_patience judges by held-out rows, as the test rows are for "
                "the last word: set data.val_size, like 5000, or remove it"
            )
        if self.data.place == "host" and self.augment.albumentations and self.augment.workers:
            raise ValueError(
                "data.place=host: the workers of augment.albumentations fill whole epochs, which go to the device "
                "at once; set augment.workers=0, or data.place=device"
            )
        resize = self.model.progressive_resize
        if resize and resize.epochs > self.run.epochs:
            raise ValueError(
                f"model.progressive_resize.epochs={resize.epochs} is past run.epochs={self.run.epochs}, so the network "
                "would be judged at a size that it was never trained at: lower it, like run.epochs"
            )
        if self.averaging and (self.averaging.start_epoch or 0) > self.run.epochs:
            raise ValueError(
                f"averaging.start_epoch={self.averaging.start_epoch} is past run.epochs={self.run.epochs}"
            )
        if self.augment.views is None and "cached" in (t.placement for t in self.all_teachers):
            raise ValueError("a cached teacher needs augment.views: a number of views, or all")

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        return (self.teacher,) if self.teacher else self.teachers or ()

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir) / self.name


ADAPTER = TypeAdapter(Recipe)


def to_yaml(recipe: Recipe | dict[str, Any]) -> str:
    content = recipe if isinstance(recipe, dict) else to_dict(recipe)
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors: recipes/schema.json."""
    schema = ADAPTER.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


CudaGraphs = Literal["auto", "on", "off"]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All that the recipe says, defaults included, as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
