"""Combine the stored predictions of several runs.

Uses predictions.safetensors and evaluation/val_predictions.safetensors, so no model is run. Weights are
chosen on validation rows, never on the test split.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.report import VAL_PREDICTIONS
from cifar_dist.evaluation.scores import (
    bootstrap_interval,
    choose_temperature,
    mcnemar,
    percent,
    reliability,
)
from cifar_dist.inference.stored_run import Run
from cifar_dist.run_folder.evaluations import EVALUATION_FOLDER
from cifar_dist.run_folder.results import read_predictions
from cifar_dist.training.fork import describe_fork
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write, write_json
from cifar_dist.utils.log import log

ENSEMBLE_FILES = {"ensemble.json", "predictions.safetensors", "teachers.yaml"}


def choose_weights(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the weights (positive, sum 1) of f32 [R, N, C] logits whose mean has the least loss.

    The loss is convex in the weights. L-BFGS optimizes their softmax parameters, so they stay on
    the simplex.
    """
    logits = logits.double()
    parameters = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.einsum("r,rnc->nc", parameters.softmax(0), logits), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return [round(weight, 4) for weight in parameters.detach().softmax(0).tolist()]


def weighted_mean(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the mean of f32 [R, N, C] logits as f32 [N, C]; weights are normalized to sum 1."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return torch.einsum("r,rnc->nc", shares, logits.double()).float()


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Two members compared on the test split, in percent of its images."""

    first: str
    second: str
    disagree: float  # predict different classes
    both_wrong: float
    oracle_top1: float  # of a perfect choice between the two


def diversity(names: Sequence[str], logits: Tensor, labels: Tensor) -> list[Diversity]:
    """Compare each pair of members, given f32 [R, N, C] logits."""
    predicted = logits.argmax(2)
    correct = predicted == labels
    return [
        Diversity(
            first=names[i],
            second=names[j],
            disagree=percent(predicted[i] != predicted[j]),
            both_wrong=percent(~correct[i] & ~correct[j]),
            oracle_top1=percent(correct[i] | correct[j]),
        )
        for i, j in itertools.combinations(range(len(names)), 2)
    ]


def stack_logits(
    runs: Sequence[Run], predictions: Sequence[tuple[Tensor, Tensor]], what: str
) -> tuple[Tensor, Tensor]:
    """Return all members' logits, f32 [R, N, C], and their common labels; UserError if they differ."""
    first_logits, first_labels = predictions[0]
    for run, (logits, labels) in zip(runs, predictions, strict=True):
        if not torch.equal(labels, first_labels) or logits.shape != first_logits.shape:
            raise other_rows(run, runs[0], what)
    return torch.stack([logits for logits, _ in predictions]), first_labels


def other_rows(run: Run, first: Run, what: str) -> UserError:
    return UserError(
        f"{run.folder} has other {what} than {first.folder}; combine runs with the same data and "
        "data.val_size, fraction, long_tail and label_noise"
    )


def validation_logits(runs: Sequence[Run]) -> tuple[Tensor, Tensor] | None:
    """Return all members' logits for the validation rows, or None if no run has such rows."""
    if all(run.recipe.data.val_size == 0 for run in runs):
        return None
    predictions = []
    for run in runs:
        if run.recipe.data.val_size == 0:
            raise UserError(
                f"{run.folder} has no validation rows but other runs have; leave it out, or use "
                "--uniform"
            )
        stored = (
            read_predictions(
                run.folder / EVALUATION_FOLDER / VAL_PREDICTIONS,
                weights=run.summary.get("weights"),
            )
            if run.evaluation
            else None
        )
        if stored is None:
            raise UserError(
                f"{run.folder} has no stored predictions for the validation rows at its last "
                f"checkpoint; run `python -m cifar_dist.evaluate {run.folder}`, or use --uniform"
            )
        if run.recipe.data.subset != runs[0].recipe.data.subset:  # labels may be the same
            raise other_rows(run, runs[0], "validation rows")
        predictions.append(stored)
    return stack_logits(runs, predictions, "validation rows")


def member_logits(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Return all members' logits for the test rows, f32 [R, N, C], and the labels."""
    predictions = []
    for run in runs:
        if not run.is_finished or run.predictions is None:
            raise UserError(f"{run.folder} has no predictions yet; let it finish first")
        if run.environment.get("data") != runs[0].environment.get("data"):
            raise other_rows(run, runs[0], "data")  # the labels may be the same
        predictions.append(run.predictions)
    return stack_logits(runs, predictions, "test rows")


def combine(runs: Sequence[Run], *, uniform: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return the content of ensemble.json, the ensemble's test logits f32 [N, C], and the labels."""
    logits, labels = member_logits(runs)
    val = None if uniform else validation_logits(runs)
    weights = [1.0 / len(runs)] * len(runs) if val is None else choose_weights(*val)
    combined = weighted_mean(logits, weights)
    report = ensemble_report(
        runs,
        weights,
        (logits, combined, labels),
        chosen_on=chosen_on(None if val is None else len(val[1])),
        val=None if val is None else (weighted_mean(val[0], weights), val[1]),
    )
    return report, combined, labels


def chosen_on(rows: int | None) -> str:
    """Return how weights were chosen: on a number of validation rows, or not at all (None)."""
    return "nothing: uniform" if rows is None else f"{rows} validation rows"


def ensemble_report(
    runs: Sequence[Run],
    weights: Sequence[float],
    test: tuple[Tensor, Tensor, Tensor],
    *,
    chosen_on: str,
    val: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Return the content of ensemble.json.

    `test` is the members' logits f32 [R, N, C], the combined ones [N, C] and the labels; `val` is the
    combined logits and the labels of the validation rows, for a temperature.
    """
    logits, combined, labels = test
    metrics = [classification_metrics(member, labels) for member in logits]
    best = max(range(len(runs)), key=lambda index: metrics[index]["top1"])
    correct = combined.argmax(1) == labels
    low, high = bootstrap_interval(correct)
    names = [str(run.folder) for run in runs]
    report: dict[str, Any] = {
        "weights_chosen_on": chosen_on,
        "members": [
            {
                "run": str(run.folder),
                **({"origin": describe_fork(run.origin)} if run.origin else {}),
                "weight": weight,
                **member,
            }
            for run, weight, member in zip(runs, weights, metrics, strict=True)
        ],
        "ensemble": classification_metrics(combined, labels)
        | {"top1_interval": [100 * low, 100 * high], "ece": reliability(combined, labels).ece},
        "against_best_member": {"run": names[best]}
        | asdict(mcnemar(logits[best].argmax(1) == labels, correct)),
        "diversity": [asdict(pair) for pair in diversity(names, logits, labels)],
    }
    if val is not None:
        temperature = choose_temperature(*val)
        report["temperature"] = temperature
        report["ensemble"]["ece_at_temperature"] = reliability(combined / temperature, labels).ece
    return report


def log_ensemble(report: dict[str, Any]) -> None:
    log.info(f"weights chosen on {report['weights_chosen_on']}")
    for member in report["members"]:
        origin = f" ({member['origin']})" if "origin" in member else ""
        log.info(f"  {member['weight']:.4f}  {member['run']}{origin}: top1 {member['top1']:.2f} %")
    for pair in report["diversity"]:
        log.info(
            f"  {pair['first']} and {pair['second']}: disagree {pair['disagree']:.1f} %, both wrong "
            f"{pair['both_wrong']:.1f} %, oracle top1 {pair['oracle_top1']:.1f} %"
        )
    ensemble, best = report["ensemble"], report["against_best_member"]
    low, high = ensemble["top1_interval"]
    log.info(
        f"ensemble: top1 {ensemble['top1']:.2f} % ({low:.2f} to {high:.2f})  "
        f"top5 {ensemble['top5']:.2f} %  loss {ensemble['loss']:.4f}; against {best['run']} "
        f"p = {best['p']:.2g} (McNemar)"
    )


def teachers_yaml(members: Sequence[dict[str, Any]]) -> str:
    """Return the ensemble as a `teachers` section of a student's recipe."""
    lines = [
        f"  - {{run: {json.dumps(member['run'], ensure_ascii=False)}, weight: {member['weight']:g}}}"
        for member in members
        if member["weight"] > 0
    ]
    return "\n".join(
        ["# paste into a student's recipe, with a loss like distill", "teachers:", *lines, ""]
    )


def write_ensemble(folder: Path, report: dict[str, Any], logits: Tensor, labels: Tensor) -> None:
    """Write ensemble.json, predictions.safetensors and teachers.yaml."""
    tensors = {"logits": logits.contiguous(), "labels": labels}
    atomic_write(folder / "predictions.safetensors", save(tensors))
    atomic_write(folder / "teachers.yaml", teachers_yaml(report["members"]))
    write_json(folder / "ensemble.json", report)
