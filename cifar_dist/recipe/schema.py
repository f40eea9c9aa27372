"""The recipe: one experiment, composed of the config classes of the packages below.

Their defaults are the defaults; recipes do not inherit from each other. Only this package knows the
validator.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from cifar_dist.data.augment.augmentation import AugmentConfig
from cifar_dist.data.training_rows import DataConfig
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.distributed.tree_sum import GradReduceDtype, Reduction
from cifar_dist.losses.base import Loss
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.losses.registry import LOSSES
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.optim.averaging import AveragingConfig
from cifar_dist.optim.optimizer import OptimConfig
from cifar_dist.tracking.tracker import TrackingConfig
from cifar_dist.utils.config import Count, Index, Positive, config
from cifar_dist.utils.precision import Precision

if TYPE_CHECKING:
    Losses = dict[str, Loss]
else:  # one key per loss
    Losses = TypedDict("Losses", dict(LOSSES), total=False)  # noqa: UP013
    Losses.__pydantic_config__ = {"extra": "forbid"}

CudaGraphs = Literal["auto", "on", "off"]


@config
class RunConfig:
    """Length, batch, precision, and how a run is executed."""

    epochs: Count = 200  # length of the training
    batch_size: Count = 250  # images in the global batch, for any number of processes
    # parts of the global batch, each with its own BatchNorm statistics; null: one per process of the
    # first start
    micro_batches: Count | None = None
    precision: Precision = "auto"  # auto: bf16 where it is native, else fp32; kept on resume
    seed: Index = 0  # seed of initial weights, order of images and dropout
    output_dir: str = "runs"  # parent of the run folder, which has the name of the recipe
    threads: Count | None = None  # CPU threads per process; null: an equal part of the CPUs
    eval_every_epochs: Count = 1  # epochs between evaluations
    # epochs without a better validation top-1 after which training stops; needs data.val_size;
    # null: never
    early_stopping_patience: Count | None = None
    save_every_minutes: Positive = 10.0  # minutes between checkpoints
    log_every_steps: Count = 50  # steps between log lines
    keep_checkpoints: Count = 2  # newest checkpoints to keep, besides the best by validation top-1
    compile: bool = False  # compile the model with torch.compile
    cuda_graphs: CudaGraphs = "auto"  # auto: if the step can be captured; on: an error if it cannot
    # exact: the same bits on 1, 2, 4, 8, ... processes; ddp: DDP, which sends gradients during the
    # backward, equal up to rounding
    reduction: Reduction = "exact"
    grad_reduce_dtype: GradReduceDtype = "fp32"  # precision of the gradients in the all-reduce
    timeout_seconds: Count = 600  # seconds to wait for a process without progress; at least 4
    # stop the run at a loss or gradient that is NaN or infinite, or skip the step
    on_nonfinite: Literal["stop", "skip"] = "stop"
    deterministic: bool = False  # reproducible bits on a GPU, but slower

    def __post_init__(self) -> None:
        if self.micro_batches is not None and self.micro_batches > self.batch_size:
            raise ValueError(
                f"micro_batches={self.micro_batches} must be at most batch_size={self.batch_size}"
            )
        if self.timeout_seconds < 4:
            raise ValueError("timeout_seconds must be at least 4")

    @property
    def max_consecutive_skips(self) -> int:
        """Steps in a row that may be skipped; the loss scaler of fp16 skips some when it grows."""
        return 20 if self.may_skip else 1

    @property
    def may_skip(self) -> bool:
        return self.on_nonfinite == "skip" or self.precision == "fp16"


@config
class Recipe:
    """One experiment."""

    name: str  # name of the run and its folder: letters, digits, '.', '_' and '-'
    run: RunConfig = RunConfig()  # length, batch size, precision, checkpoints
    data: DataConfig = DataConfig()  # the data set and the validation split
    model: ModelConfig = ModelConfig()  # backbone, image size, head and initial weights
    augment: AugmentConfig = AugmentConfig()  # image augmentation
    optim: OptimConfig = OptimConfig()  # optimizer and learning rate schedule
    averaging: AveragingConfig | None = None  # average of the weights to evaluate; null: none
    # losses by name, whose weighted sum is minimized; cross_entropy if left out
    losses: Losses = dataclasses.field(default_factory=lambda: {"cross_entropy": CrossEntropy()})
    teacher: TeacherConfig | None = None  # teacher of the distillation losses; null: none
    # several teachers instead of `teacher`, whose logits are averaged
    teachers: tuple[TeacherConfig, ...] | None = None
    tracking: TrackingConfig = TrackingConfig()  # logging to Weights & Biases

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, '.', '_' and '-'")
        self._check_losses()
        self._check_teachers()
        self._check_batches()
        self._check_epochs()

    def _check_losses(self) -> None:
        if not self.losses:
            raise ValueError("losses is empty; name at least one, like cross_entropy: {}")
        for name, loss in self.losses.items():
            if loss.head is not None and loss.head != self.model.head:
                raise ValueError(f"losses.{name} needs model.head={loss.head}")
            if loss.needs_teacher and not self.all_teachers:
                raise ValueError(f"losses.{name} needs a teacher: add teacher.run=runs/NAME")
            if self.augment.uses_mixing and not loss.supports_mixup:
                raise ValueError(
                    f"losses.{name} needs images with one label: remove it, or augment.mixup, "
                    "cutmix and resizemix"
                )
        if not any(loss.trains_classifier and loss.weight for loss in self.losses.values()):
            raise ValueError(
                f"losses ({', '.join(self.losses)}): none with a weight trains the classifier, so "
                "its accuracy would be meaningless; add cross_entropy: {weight: 1.0}, or arcface "
                "with model.head=cosine"
            )
        scaled = (loss.head == "cosine" and loss.weight for loss in self.losses.values())
        if self.model.head == "cosine" and not any(scaled):
            raise ValueError(
                f"losses ({', '.join(self.losses)}): model.head=cosine gives logits from -1 to 1, too "
                "small for a softmax; set model.head=linear, or add a loss that scales them: "
                "arcface or cosface"
            )

    def _check_teachers(self) -> None:
        if self.teacher and self.teachers:
            raise ValueError("teacher and teachers exclude each other: remove one of them")
        if self.all_teachers and not any(loss.needs_teacher for loss in self.losses.values()):
            names = ", ".join(name for name, kind in LOSSES.items() if kind.needs_teacher)
            raise ValueError(f"no loss uses the teacher: add one of {names}, or remove the teacher")
        if self.augment.views is None and "cached" in (t.placement for t in self.all_teachers):
            raise ValueError("a cached teacher needs augment.views: a number of views, or all")

    def _check_batches(self) -> None:
        repeated = self.augment.repeated
        if self.run.batch_size % repeated:
            raise ValueError(
                f"augment.repeated={repeated} does not divide run.batch_size="
                f"{self.run.batch_size}: change one of them"
            )
        if repeated > 1 and not self.data.shuffle:
            raise ValueError(
                "augment.repeated would show the same rows in each epoch if their order is fixed: "
                "remove it, or set data.shuffle"
            )
        if self.data.place == "host" and self.augment.albumentations and self.augment.workers:
            raise ValueError(
                "data.place=host: albumentations workers fill whole epochs, which are copied to the "
                "device at once; set augment.workers=0, or data.place=device"
            )

    def _check_epochs(self) -> None:
        if self.run.early_stopping_patience and not self.data.val_size:
            raise ValueError(
                "run.early_stopping_patience needs validation rows: set data.val_size, like 5000, "
                "or remove it"
            )
        resize = self.model.progressive_resize
        if resize and resize.epochs > self.run.epochs:
            raise ValueError(
                f"model.progressive_resize.epochs={resize.epochs} must be at most run.epochs="
                f"{self.run.epochs}: the model would be evaluated at a size it was never trained at"
            )
        if self.averaging and (self.averaging.start_epoch or 0) > self.run.epochs:
            raise ValueError(
                f"averaging.start_epoch={self.averaging.start_epoch} must be at most run.epochs="
                f"{self.run.epochs}"
            )

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        return (self.teacher,) if self.teacher else self.teachers or ()

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir) / self.name


ADAPTER = TypeAdapter(Recipe)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with its defaults as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def to_yaml(recipe: Recipe | dict[str, Any]) -> str:
    content = recipe if isinstance(recipe, dict) else to_dict(recipe)
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
