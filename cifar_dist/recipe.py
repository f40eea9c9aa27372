"""Floor 4. YAML -> Recipe, strictly: what is not understood exactly is refused with a suggestion.

The only file that knows the validator. A recipe is made of the config classes of the floors below;
their defaults are the defaults, and there is no inheritance between recipes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cifar_dist.config import Count, Index, Positive, config
from cifar_dist.data.arrow import Place
from cifar_dist.data.augment import AugmentConfig
from cifar_dist.engine.graphed_step import CudaGraphs
from cifar_dist.engine.runtime import ReducePrecision
from cifar_dist.engine.step import Precision
from cifar_dist.engine.tracking import TrackingConfig
from cifar_dist.errors import UserError
from cifar_dist.learn.ema import EmaConfig
from cifar_dist.learn.loss import Loss
from cifar_dist.learn.losses import LOSSES, CrossEntropy
from cifar_dist.learn.optim import OptimConfig
from cifar_dist.learn.teacher import TeacherConfig
from cifar_dist.nets.backbones import ModelConfig
from cifar_dist.strict_yaml import parse_yaml
from cifar_dist.unknown_keys import refuse_unknown_keys

if TYPE_CHECKING:
    Losses = dict[str, Loss]
else:  # a key for each loss; one line in LOSSES is all that a new loss needs
    Losses = TypedDict("Losses", dict(LOSSES), total=False)  # noqa: UP013
    Losses.__pydantic_config__ = {"extra": "forbid"}

MAX_BYTES = 1 << 16  # a recipe is a page, not a program

# Where it is written, how often it reports, where the data lie: never "a changed recipe".
NOT_THE_RECIPE = (
    "run.output",
    "run.threads",
    "run.eval_every_epochs",
    "run.save_every_minutes",
    "run.report_every_steps",
    "run.keep_checkpoints",
    "run.compile",
    "run.cuda_graphs",
    "run.timeout_seconds",
    "run.on_nonfinite",
    "data.path",
    "data.source",
    "data.place",
    "augment.host_workers",
    "tracking",
)
PLACEMENT = (".placement", ".shard_over", ".cache")  # of a teacher: other costs, the same numbers

# What people write from habit, and where it lives here.
HABITS = {
    "gradient_accumulation_steps": "run.shards (a global batch is cut into shards)",
    "accumulate_grad_batches": "run.shards (a global batch is cut into shards)",
    "mixed_precision": "run.precision",
    "amp": "run.precision",
    "num_epochs": "run.epochs",
    "num_processes": "nothing: the launcher decides the number of processes",
    "num_gpus": "nothing: the launcher decides the number of processes",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "scheduler": "optim.schedule",
    "name_or_path": "model.backbone",
    "per_device_train_batch_size": "run.batch_size (the global batch)",
    "wandb": "tracking.mode",
    "graph": "run.cuda_graphs",
    "albumentations": "augment.host (a list of {Name: {arguments}})",
}


@config
class RunConfig:
    """How long, how large, how exact, and where to."""

    epochs: Count = 200
    batch_size: Count = 250  # global, whatever the number of processes
    shards: Count | None = None  # parts of the global batch; None: the first start's world size
    precision: Precision = "bf16"
    seed: Index = 0
    output: str = "runs"
    threads: Count | None = None  # CPU threads a process; None: the machine's, divided
    eval_every_epochs: Count = 1
    stop_after_epochs_without_gain: Count | None = None  # in held-out accuracy, never in the test's
    save_every_minutes: Positive = 10.0
    report_every_steps: Count = 50
    keep_checkpoints: Count = 2
    compile: bool = False
    cuda_graphs: CudaGraphs = "auto"  # record the step and replay it; on: an error where that fails
    reduce_precision: ReducePrecision = "fp32"  # in which ranks send each other gradients
    timeout_seconds: Count = 600  # how long a rank may keep the others waiting
    on_nonfinite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is NaN or infinite
    deterministic: bool = False  # the same bits twice on a GPU, at a price

    def __post_init__(self) -> None:
        if self.shards is not None and self.shards > self.batch_size:
            raise ValueError(f"shards={self.shards} is more than batch_size={self.batch_size} rows")
        if self.timeout_seconds < 4:
            raise ValueError("timeout_seconds: a watch that looks each second needs 4 or more")

    @property
    def most_skips(self) -> int:
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
    holdout: Index = 0  # rows of train, stratified by class, to choose hyper-parameters on


@config
class Recipe:
    """One experiment: all that decides its numbers, and the few things that do not."""

    name: str
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig | None = None
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
            if loss.taught and not self.taught_by:
                raise ValueError(f"losses.{name} needs a teacher: add teacher.run=runs/NAME")
            if self.augment.mixes and not loss.mixes:
                raise ValueError(
                    f"losses.{name} compares pictures of one label each: remove it, "
                    "or augment.mixup and augment.cutmix"
                )
        if not any(loss.classifies and loss.weight for loss in self.losses.values()):
            raise ValueError(
                f"losses ({', '.join(self.losses)}): none with a weight teaches the classifier, so its "
                "accuracy would say nothing; add cross_entropy: {weight: 1.0}, or arcface with "
                "model.head=cosine"
            )
        if self.teacher and self.teachers:
            raise ValueError("teacher and teachers both say who teaches: remove one of them")
        if self.taught_by and not any(loss.taught for loss in self.losses.values()):
            taught = ", ".join(name for name, kind in LOSSES.items() if kind.taught)
            raise ValueError(f"no loss listens to the teacher: add one of {taught}, or remove it")

        if self.run.batch_size % self.augment.repeats:
            raise ValueError(
                f"augment.repeats={self.augment.repeats} does not divide "
                f"run.batch_size={self.run.batch_size}: change one of them"
            )
        if self.augment.repeats > 1 and not self.data.shuffle:
            raise ValueError(
                "augment.repeats would show the same part of the rows in each epoch where their order is "
                "fixed: remove it, or set data.shuffle"
            )
        if self.run.stop_after_epochs_without_gain and not self.data.holdout:
            raise ValueError(
                "run.stop_after_epochs_without_gain judges by held-out rows, as the test rows are for "
                "the last word: set data.holdout, like 5000, or remove it"
            )
        if self.data.place == "host" and self.augment.host and self.augment.host_workers:
            raise ValueError(
                "data.place=host: the workers of augment.host fill whole epochs, which go to the device "
                "at once; set augment.host_workers=0, or data.place=device"
            )
        growing = self.model.growing
        if growing and growing.epochs > self.run.epochs:
            raise ValueError(
                f"model.growing.epochs={growing.epochs} is past run.epochs={self.run.epochs}, so the network "
                "would be judged at a size that it was never trained at: lower it, like run.epochs"
            )
        if self.ema and (self.ema.start_epoch or 0) > self.run.epochs:
            raise ValueError(
                f"ema.start_epoch={self.ema.start_epoch} is past run.epochs={self.run.epochs}"
            )
        if self.augment.views is None and "cached" in (t.placement for t in self.taught_by):
            raise ValueError("a cached teacher needs augment.views: a number of views, or all")

    @property
    def taught_by(self) -> tuple[TeacherConfig, ...]:
        return (self.teacher,) if self.teacher else self.teachers or ()

    @property
    def folder(self) -> Path:
        return Path(self.run.output) / self.name


ADAPTER = TypeAdapter(Recipe)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides; UserError with path and remedy."""
    raw = read_plain(path)
    for override in overrides or []:
        apply_override(raw, override)
    return validate(raw, where=str(path))


def read_plain(path: Path) -> dict[str, Any]:
    """A recipe's file as plain data, of which nothing is checked yet."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES} bytes; this is no recipe")
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; see recipes/"
        raise UserError(f"{path}: no such recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    raw = parse_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping that begins with `name: ...`")
    return raw


def validate(raw: dict[str, Any], *, where: str) -> Recipe:
    """Check plain data against the config classes; types are exact, unknown keys are refused."""
    refuse_unknown_keys(raw, Recipe, where=where, habits=HABITS)
    try:
        text = json.dumps(raw, allow_nan=False)
    except ValueError:
        raise UserError(f"{where}: a number in it is not finite; write one that is") from None
    try:
        return ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'recipe'}: "
            + problem["msg"].removeprefix("Value error, ")
            + (
                ""
                if problem["type"] in ("missing", "value_error")
                else f" (got {problem['input']!r})"
            )
            for problem in error.errors()
        ]
        raise UserError(f"{where}: {'; '.join(problems[:4])}") from None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """All that the recipe says, defaults included, as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"run.epochs": 200, ...}; lists of numbers are values, others are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(place): inner for place, inner in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for name, inner in value.items():
        pairs |= flat(inner, f"{prefix}.{name}".lstrip("."))
    return pairs


def not_of(recipe: Recipe) -> tuple[str, ...]:
    """NOT_THE_RECIPE, but for how often it looks, where that decides when it ends."""
    looks = "run.eval_every_epochs" if recipe.run.stop_after_epochs_without_gain else None
    return tuple(name for name in NOT_THE_RECIPE if name != looks)


def recipe_changes(recipe: Recipe) -> list[str]:
    """How it differs from the one that its run folder was trained with: `run.epochs: 200 -> 300`."""
    path = recipe.folder / "recipe.yaml"
    if not path.exists():
        return []
    raw = read_plain(path)
    try:
        before = flat(resolved(validate(raw, where=str(path))))  # with today's defaults
    except UserError:
        before = flat(raw)  # of a version that had other keys or allowed more
    return [
        f"{name}: {old} -> {new}"
        for name, old, new in changes(before, flat(resolved(recipe)))
        if not name.startswith(not_of(recipe)) and not name.endswith(PLACEMENT)
    ]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old, new) wherever two flat recipes differ.

    What one of them does not name, since it is older or a section is not there, has its default.
    """
    default = flat(resolved(Recipe(name="default")))
    for name in [name for name in default if name.startswith("losses.")]:
        del default[name]  # a loss that is not named is none
    return [
        (name, old, new)
        for name in sorted(before.keys() | after.keys())
        if (old := before.get(name, default.get(name)))
        != (new := after.get(name, default.get(name)))
    ]


SEEDS = ("name", "run.seed", "run.shards", "augment.seed")


def identity(recipe: Recipe) -> dict[str, Any]:
    """What two runs have in common that differ in their seeds alone; `run.shards` is the run's to say."""
    return {
        name: value
        for name, value in flat(resolved(recipe)).items()
        if not name.startswith((*not_of(recipe), *SEEDS)) and not name.endswith(PLACEMENT)
    }


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(resolved(recipe), sort_keys=False, default_flow_style=None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors: recipes/schema.json."""
    schema = ADAPTER.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in plain data; may open a section that the file lacks."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"{override!r}: write an override as section.key=value, like run.epochs=2")
    *sections, last = dotted.split(".")
    place = raw
    for section in sections:
        inner = place.get(section)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{override!r}: {section} is a value, not a section")
        place[section] = place = inner or {}
    place[last] = parse_yaml(text, where=override)
