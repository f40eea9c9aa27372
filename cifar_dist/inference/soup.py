"""Average the weights of runs: model soups (Wortsman et al. 2022, arXiv 2203.05482).

Members are chosen on validation rows, never on the test split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import SPLITS, Split, load_split
from cifar_dist.data.training_rows import TrainingData, training_data
from cifar_dist.distributed.context import DistContext
from cifar_dist.evaluation.evaluator import EvalResult, evaluate, update_bn
from cifar_dist.inference.ensembling import chosen_on, ensemble_report, member_logits
from cifar_dist.inference.stored_run import Run
from cifar_dist.inference.trained_model import TrainedModel, load_trained_model
from cifar_dist.losses.registry import logit_scale
from cifar_dist.models.freeze import find_unfreeze_epochs, frozen_parameters
from cifar_dist.models.weights import StateDict
from cifar_dist.recipe.diff import NON_SEMANTIC_KEYS, config_diff, flatten
from cifar_dist.recipe.schema import to_dict
from cifar_dist.run_folder.results import last_checkpoint
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

# Keys of `model` and `data` that change the training, but neither the trained network nor its rows.
TRAINING_KEYS = (
    *("model.drop_rate", "model.drop_path_rate", "model.grad_checkpointing", "data.shuffle"),
    *("model.progressive_resize", "model.mixed_resolution"),
)
CONTEXT = DistContext(0, 1, None)  # one process


@dataclass(frozen=True, kw_only=True, eq=False)
class Soup:
    """A model with the mean of its members' weights; one member alone is the run itself."""

    members: tuple[int, ...]  # index of each in the list of runs
    trained: TrainedModel  # the first member, with the mean of the weights
    bn_rows: int  # training rows of the recomputed BatchNorm statistics; 0: not recomputed
    val: EvalResult | None  # on the validation rows

    @property
    def val_top1(self) -> float:
        assert self.val
        return self.val.metrics["top1"]


def mean_state(states: Sequence[StateDict]) -> dict[str, Tensor]:
    """Return the means of floating-point tensors, computed in float64; others are the first one's."""
    return {
        name: torch.stack([state[name].cpu().double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in states[0].items()
    }


def average_models(
    members: Sequence[TrainedModel], train: TrainingData
) -> tuple[TrainedModel, int]:
    """Return the first member with the mean of all weights, and the rows of its BatchNorm statistics.

    The statistics are recomputed on training rows, augmented as in the first member's last epoch.
    """
    first = members[0]
    recipe, last_epoch = first.recipe, first.recipe.run.epochs - 1
    model = copy.deepcopy(first.model)
    model.load_state_dict(mean_state([member.model.state_dict() for member in members]))
    rows = update_bn(
        model,
        Augment(recipe.augment, train.split, train.rows),
        train.split,
        train.rows,
        seed=recipe.run.seed,
        epoch=last_epoch,
        precision=recipe.run.precision,
        context=CONTEXT,
        frozen=frozen_parameters(find_unfreeze_epochs(model, recipe.model.freeze), last_epoch),
    )
    return replace(first, model=model, evaluation=None, temperature=None), rows


def greedy_soup(
    runs: Sequence[Path], singles: Sequence[Soup], average: Callable[[tuple[int, ...]], Soup]
) -> Soup:
    """Return the greedy soup of the paper.

    `singles` are the runs alone and `average` returns the mean of some of them. They are tried in the
    order of their validation top-1 and kept if that of the soup does not fall.
    """
    best, *others = sorted(singles, key=lambda single: -single.val_top1)
    log.info(f"start with {runs[best.members[0]]}: val top1 {best.val_top1:.2f} %")
    soup = best
    for other in others:
        larger = average(soup.members + other.members)
        is_kept = larger.val_top1 >= soup.val_top1
        log.info(
            f"  with {runs[other.members[0]]} ({other.val_top1:.2f} %): {larger.val_top1:.2f} %, "
            + ("kept" if is_kept else "left out")
        )
        soup = larger if is_kept else soup
    if soup is best:
        log.info("no other run is kept; averages need runs that share their start (train --fork)")
    return soup


def common_config(run: Run) -> dict[str, Any]:
    """Return what all members of a soup have in common, by name."""
    config = {
        name: value
        for name, value in flatten(to_dict(run.recipe)).items()
        if name.startswith(("model.", "data."))
        and not name.startswith((*NON_SEMANTIC_KEYS, *TRAINING_KEYS))
    }
    return config | {"scale of the losses": logit_scale(run.recipe.losses.values())}


def load_members(runs: Sequence[Run], data: Path | None) -> list[TrainedModel]:
    """Return the models that the runs' results are of; UserError if their weights have no mean."""
    for run in runs:
        for name, first, other in config_diff(common_config(runs[0]), common_config(run)):
            raise UserError(
                f"{run.folder} cannot be averaged with {runs[0].folder}: {name} is {other}, not "
                f"{first}; leave it out, or combine predictions, without --soup"
            )
    members = [load_trained_model(run.folder, data=data) for run in runs]
    for run, member in zip(runs, members, strict=True):
        if member.checkpoint.name != last_checkpoint(run.summary):
            raise UserError(
                f"{run.folder}: the weights of its results ({last_checkpoint(run.summary)}) are "
                "damaged or missing; leave it out"
            )
    return members


def evaluate_rows(trained: TrainedModel, split: Split, rows: Tensor) -> EvalResult:
    return evaluate(
        trained.model,
        split,
        rows,
        precision=trained.recipe.run.precision,
        logit_scale=trained.logit_scale,
        context=CONTEXT,
    )


def make_soup(
    runs: Sequence[Run], *, uniform: bool, data: Path | None
) -> tuple[TrainedModel, EvalResult, dict[str, Any]]:
    """Return a soup of runs, its evaluation on the test split, and the content of ensemble.json.

    It is greedy, or of all runs if `uniform` or without validation rows. `data` is the folder of their
    data, if it has moved. UserError for runs whose weights have no mean.
    """
    logits, _ = member_logits(runs)
    models = load_members(runs, data)
    config, device = runs[0].recipe.data, next(models[0].model.parameters()).device
    train_split, test_split = (
        load_split(data or Path(config.path), name, device, config.place, config.labels)
        for name in SPLITS
    )
    train = training_data(config, train_split)

    def average(members: tuple[int, ...]) -> Soup:
        trained, bn_rows = models[members[0]], 0
        if len(members) > 1:
            trained, bn_rows = average_models([models[index] for index in members], train)
        val = None
        if train.val_rows is not None:
            val = evaluate_rows(trained, train.split, train.val_rows)
        return Soup(members=members, trained=trained, bn_rows=bn_rows, val=val)

    indices = range(len(runs))
    singles = [] if train.val_rows is None else [average((index,)) for index in indices]
    if uniform or not singles:
        soup = average(tuple(indices))
    else:
        soup = greedy_soup([run.folder for run in runs], singles, average)
    test = evaluate_rows(soup.trained, test_split, torch.arange(len(test_split.labels)))
    report = ensemble_report(
        runs,
        [1 / len(soup.members) if index in soup.members else 0.0 for index in indices],
        (logits, test.logits, test.labels),
        chosen_on=chosen_on(None if uniform or not soup.val else len(soup.val.labels)),
        val=(soup.val.logits, soup.val.labels) if soup.val else None,
    )
    report["batchnorm_rows"] = soup.bn_rows
    if soup.val:
        report["ensemble"]["val_top1"] = soup.val_top1
        for member, single in zip(report["members"], singles, strict=True):
            member["val_top1"] = single.val_top1
    return replace(soup.trained, temperature=report.get("temperature")), test, report
