"""Decide how a training starts: from step 0, from a checkpoint, or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_dist import __version__
from cifar_dist.data.dataset import data_digest, read_digest
from cifar_dist.data.ingest.archive import DATASETS
from cifar_dist.data.ingest.preparation import SYNTHETIC, prepare
from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext
from cifar_dist.models.backbones import pretrained_cfg
from cifar_dist.models.classifier import num_parameters
from cifar_dist.models.hub import find_weights
from cifar_dist.models.weights import read_weights
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.optim.schedule import schedule_problem
from cifar_dist.recipe.diff import recipe_diff
from cifar_dist.recipe.dry_run import check_augment, meta_model, num_classes
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.recipe.teachers import check_caches, find_teacher
from cifar_dist.run_folder import results
from cifar_dist.run_folder.checkpoint import checkpoints, latest_valid, load_progress
from cifar_dist.run_folder.evaluations import EVALUATION_FOLDER
from cifar_dist.training.fork import Fork, is_fork_of, plan_fork
from cifar_dist.utils.errors import UserError, is_main_rank
from cifar_dist.utils.files import (
    atomic_write,
    make_folder,
    remove_folder,
    rename,
    try_read_json,
    write_json,
)
from cifar_dist.utils.log import log
from cifar_dist.utils.suggest import closest

REQUIRED_KEYS = {"top1", "epochs", "seconds"}  # of the summary of a finished run
SYNTHETIC_NOTE = "This is synthetic data, not CIFAR-100."


def check_names(recipe: Recipe) -> None:
    """Refuse unknown backbones, optimizers and transforms before anything is downloaded."""
    pretrained_cfg(recipe.model.backbone)
    build_optimizer(recipe.optim, torch.nn.Linear(1, 1))
    check_augment(recipe)


def describe_model(recipe: Recipe) -> str:
    """Return the backbone and its size; UserError if a name is unknown or the model cannot be built."""
    check_names(recipe)
    parameters = num_parameters(meta_model(recipe.model, num_classes(recipe)))
    return f"{recipe.model.backbone}, {parameters:,} parameters"


def describe_weights(recipe: Recipe) -> str:
    """Return where the first weights come from; UserError if they can be neither read nor downloaded."""
    config = recipe.model
    if saved := latest_valid(recipe.folder / "checkpoints"):
        return str(saved)
    if config.weights is not None:
        read_weights(Path(config.weights))
        return config.weights
    if not config.pretrained:
        return "initialized at random"
    cached = find_weights(pretrained_cfg(config.backbone), config.backbone)
    return str(cached or "not cached yet, can be downloaded")


def describe_teachers(recipe: Recipe) -> str:
    """Return the teachers' names; UserError if one, or its cache of logits, is missing or unfit."""
    check_caches(recipe, [find_teacher(teacher) for teacher in recipe.all_teachers])
    return ", ".join(teacher.run for teacher in recipe.all_teachers) or "none"


def ensure_data(recipe: Recipe) -> bool:
    """Prepare missing data on rank 0 while the others wait; False if a stop signal arrives."""
    path, source = Path(recipe.data.path), recipe.data.source
    has_data = (path / "digest.json").exists()
    if not has_data and source is None:  # on all ranks: there is nothing to wait for
        siblings = (file.parent.name for file in path.parent.glob("*/digest.json"))
        near = closest(path.name, siblings)
        hint = f"did you mean {path.parent / near}? If not, " if near else ""
        raise UserError(
            f"{path} has no data; {hint}run `python -m cifar_dist.prepare --output {path}`, or "
            "set data.source as well"
        )
    if not has_data and is_main_rank():
        assert source is not None
        # A folder with the name of a data set must not be filled with another one.
        prepare(source, path, dataset=DATASETS.get(path.name))
    waited = 0
    while not (path / "digest.json").exists():
        if signals.stop_signal():
            return False
        time.sleep(0.2)
        waited += 1
        if waited % 300 == 0:
            log.warning(
                f"waiting for rank 0 to prepare {path}; is this folder shared by all nodes?"
            )
    return True


def is_synthetic(recipe: Recipe) -> bool:
    path = Path(recipe.data.path)
    if (path / "digest.json").exists():
        return bool(read_digest(path)["content"] == SYNTHETIC)
    return recipe.data.source == SYNTHETIC


def find_finished_run(recipe: Recipe, *, fork: Path | None = None) -> dict[str, Any] | None:
    """Return the summary if the run folder holds this recipe, finished on the same data and teachers.

    With `fork`, only if it was forked from that run.
    """
    folder = recipe.folder
    summary = results.read_summary(folder)
    if not summary or not summary.get("finished") or not summary.keys() >= REQUIRED_KEYS:
        return None
    environment = try_read_json(folder / "environment.json")
    if environment is None or recipe_diff(recipe):
        return None
    if fork and not is_fork_of(fork, environment.get("origin")):
        return None
    teachers = [find_teacher(teacher).digest for teacher in recipe.all_teachers]
    same_data = environment.get("data") == data_digest(Path(recipe.data.path))
    return summary if same_data and environment.get("teachers", []) == teachers else None


def log_session(recipe: Recipe, context: DistContext, device: torch.device) -> None:
    log.info(
        f"cifar_dist {__version__}: {context.world_size} process(es) on "
        f"{device.type}, {recipe.run.precision}, "
        f"{torch.get_num_threads()} CPU thread(s) each"
    )
    if is_synthetic(recipe):
        log.info(SYNTHETIC_NOTE)
    if context.is_main and (problem := schedule_problem(recipe.optim, recipe.run.epochs)):
        log.warning(problem)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a training starts: its own newest checkpoint, that of another run, or step 0."""

    checkpoint: Path | None = None
    step: int = 0  # completed updates
    micro_batches: int | None = None  # of the checkpoint
    fork: Fork | None = None  # also when a fork resumes
    is_resumed: bool = False


def find_start(recipe: Recipe, *, data: str, teachers: list[str], fork: Path | None) -> Start:
    """Return where to start; `data` and `teachers` are digests, `fork` is the folder of another run.

    UserError if recipe, data or teachers differ from those of the run folder. A run folder without a
    completed step is started over.
    """
    folder = recipe.folder
    saved = latest_valid(folder / "checkpoints")
    if saved is None:
        stored = (try_read_json(folder / "environment.json") or {}).get("origin")
        fork = fork or (Path(stored["run"]) if stored else None)  # killed before its first save
        return forked_start(recipe, fork, data=data) if fork else Start()
    metadata = load_progress(saved)
    differences = recipe_diff(recipe)
    if metadata["data"] != data:
        differences.append(f"data set: {metadata['data'][:12]} -> {data[:12]}")
    pairs = zip(recipe.all_teachers, metadata.get("teachers", []), teachers, strict=False)
    differences += [
        f"weights of teacher {teacher.run}: {before[:12]} -> {after[:12]}"
        for teacher, before, after in pairs  # another number of teachers is in the recipe
        if before != after
    ]
    if differences and metadata["step"] == 0:
        remove_folder(saved)
        return forked_start(recipe, fork, data=data) if fork else Start()
    if differences:
        raise UserError(
            f"{folder} was trained with another recipe ({'; '.join(differences)}); choose another "
            f"name (name=...), and to continue from these weights add --fork {folder}"
        )
    origin = metadata.get("origin")
    if fork and not is_fork_of(fork, origin):
        raise UserError(
            f"{folder} was not forked from {fork}; choose another name (name=...), or resume it "
            "without --fork"
        )
    return Start(
        checkpoint=saved,
        step=metadata["step"],
        micro_batches=metadata["micro_batches"],
        fork=Fork(**origin) if origin else None,
        is_resumed=True,
    )


def forked_start(recipe: Recipe, folder: Path, *, data: str) -> Start:
    fork = plan_fork(recipe, folder, data=data)
    metadata = load_progress(fork.checkpoint)
    return Start(
        checkpoint=fork.checkpoint,
        step=fork.start_step,
        micro_batches=recipe.run.micro_batches or metadata["micro_batches"],
        fork=fork,
    )


def claim_folder(recipe: Recipe, environment: dict[str, Any], start: Start) -> None:
    """Write this recipe into the run folder, and remove what does not belong to it.

    Damaged checkpoints newer than that of `start` are renamed: they would count as the newest ones.
    """
    folder = recipe.folder
    if not start.is_resumed:
        set_results_aside(folder)
    for newer in checkpoints(folder / "checkpoints"):
        if newer == start.checkpoint:
            break
        damaged = newer.with_name(f"damaged_{newer.name}")
        remove_folder(damaged)
        rename(newer, damaged)
    if (results.read_summary(folder) or {}).get("finished"):
        (folder / "summary.json").unlink()
    (folder / "stopped").unlink(missing_ok=True)
    atomic_write(folder / "recipe.yaml", to_yaml(recipe))
    write_json(folder / "environment.json", environment)


def set_results_aside(folder: Path) -> None:
    """Move the results of an earlier run out of a folder that starts at step 0."""
    names = ("summary.json", "predictions.safetensors", EVALUATION_FOLDER, "metrics.jsonl")
    found = [name for name in names if (folder / name).exists()]
    if not found or found == ["metrics.jsonl"]:  # of a run that was killed before its first save
        return
    number = 1
    while (aside := folder / f"previous_{number}").exists():
        number += 1
    make_folder(aside)
    for name in found:
        rename(folder / name, aside / name)
    log.warning(f"{folder} starts at step 0; the results of an earlier run are now in {aside}")


def check_world_size(recipe: Recipe, *, micro_batches: int, world_size: int) -> None:
    """Refuse idle processes, and ranks that would call a sharded teacher unequally often."""
    if world_size > micro_batches:
        raise UserError(
            f"{world_size} processes for {micro_batches} micro-batches: some would be idle; start "
            f"at most {micro_batches}, or set run.micro_batches={world_size}"
        )
    if micro_batches % world_size and "sharded" in (t.placement for t in recipe.all_teachers):
        raise UserError(
            f"{micro_batches} micro-batches on {world_size} processes: some ranks would call the "
            "sharded teacher more often; start a number of processes that divides the micro-batches, "
            "or use placement: replicated"
        )
