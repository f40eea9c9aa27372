"""Let several runs decide together: weighted mean logits, weights chosen on held-out rows, never on test.

It reads what the runs have stored (predictions.safetensors, and evaluation/held_out.safetensors), so it
computes no forward. The mean of logits is also what several teachers say together.
"""

from __future__ import annotations

import itertools
import json
import sys
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
    fit_temperature,
    mcnemar,
    percent,
    reliability,
)
from cifar_dist.reporting.comparison import Run, read_logits, read_run
from cifar_dist.run_folder.evaluations import EVALUATION_FOLDER
from cifar_dist.utils.cli import check_output, command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write, write_json
from cifar_dist.utils.log import log, log_to_terminal

OURS = {"ensemble.json", "predictions.safetensors", "teachers.yaml"}


def choose_weights(logits: Tensor, labels: Tensor) -> list[float]:
    """The weights (above 0, sum 1) of f32 [R, N, C] logits whose mean has the least loss.

    The loss is convex in them; they are a softmax of what L-BFGS moves, so none leaves the simplex.
    """
    logits = logits.double()
    free = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(torch.einsum("r,rnc->nc", free.softmax(0), logits), labels)
        value.backward()
        return value

    search.step(loss)
    return [round(weight, 4) for weight in free.detach().softmax(0).tolist()]


def weighted_mean(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """f32 [R, N, C] -> f32 [N, C]; weights count by their shares, as teachers' do."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return torch.einsum("r,rnc->nc", shares, logits.double()).float()


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Two members on the test split, percent of its pictures."""

    first: str
    second: str
    disagree: float  # predict different classes
    both_wrong: float
    oracle_top1: float  # what a perfect choice between the two would have


def diversity(names: Sequence[str], logits: Tensor, labels: Tensor) -> list[Diversity]:
    predicted = logits.argmax(2)
    right = predicted == labels
    return [
        Diversity(
            first=names[i],
            second=names[j],
            disagree=percent(predicted[i] != predicted[j]),
            both_wrong=percent(~right[i] & ~right[j]),
            oracle_top1=percent(right[i] | right[j]),
        )
        for i, j in itertools.combinations(range(len(names)), 2)
    ]


def stacked(
    runs: Sequence[Run], parts: Sequence[tuple[Tensor, Tensor]], what: str
) -> tuple[Tensor, Tensor]:
    """All members' logits, f32 [R, N, C], and the labels they share; UserError where they differ."""
    labels = parts[0][1]
    for run, (logits, own) in zip(runs, parts, strict=True):
        if not torch.equal(own, labels) or logits.shape != parts[0][0].shape:
            raise UserError(
                f"{run.folder} has other {what} than {runs[0].folder}; join runs of the same data and holdout"
            )
    return torch.stack([logits for logits, _ in parts]), labels


def validation_logits(runs: Sequence[Run]) -> tuple[Tensor, Tensor] | None:
    """Every member's logits of the held-out rows; None where no run held any out."""
    holdouts = {run.recipe.data.val_size for run in runs}
    if holdouts == {0}:
        return None
    parts = []
    for run in runs:
        if run.recipe.data.val_size == 0:
            raise UserError(
                f"{run.folder} held nothing out, others did; leave it out, or take --uniform"
            )
        part = (
            read_logits(run.folder / EVALUATION_FOLDER / VAL_PREDICTIONS)
            if run.evaluation
            else None
        )
        if part is None:
            raise UserError(
                f"{run.folder} has no stored predictions of held-out rows at its end; run "
                f"`python -m cifar_dist.evaluate {run.folder}`, or take --uniform"
            )
        parts.append(part)
    return stacked(runs, parts, "validation rows")


def combine(runs: Sequence[Run], *, uniform: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What there is to say about the ensemble, its test logits f32 [N, C], and the labels."""
    parts = [run.predictions for run in runs if run.is_finished and run.predictions is not None]
    if len(parts) < len(runs):  # one that goes on still has its earlier end's
        unfinished = next(run for run in runs if not run.is_finished or run.predictions is None)
        raise UserError(f"{unfinished.folder} has no predictions yet; let it finish first")
    logits, labels = stacked(runs, parts, "test rows")
    held = None if uniform else validation_logits(runs)
    weights = [1.0 / len(runs)] * len(runs) if held is None else choose_weights(*held)
    joined = weighted_mean(logits, weights)
    names = [str(run.folder) for run in runs]
    singles = [classification_metrics(one, labels) for one in logits]
    best = max(range(len(runs)), key=lambda place: singles[place]["top1"])
    test = mcnemar(logits[best].argmax(1) == labels, joined.argmax(1) == labels)
    low, high = bootstrap_interval(joined.argmax(1) == labels)
    found: dict[str, Any] = {
        "weights_chosen_on": "nothing: equal" if held is None else f"{len(held[1])} held-out rows",
        "members": [
            {"run": name, "weight": weight} | numbers
            for name, weight, numbers in zip(names, weights, singles, strict=True)
        ],
        "ensemble": classification_metrics(joined, labels)
        | {"top1_interval": [100 * low, 100 * high], "ece": reliability(joined, labels).ece},
        "against_best_member": {"run": names[best]} | asdict(test),
        "diversity": [asdict(pair) for pair in diversity(names, logits, labels)],
    }
    if held is not None:
        temperature = fit_temperature(weighted_mean(held[0], weights), held[1])
        found["temperature"] = temperature
        found["ensemble"]["ece_at_temperature"] = reliability(joined / temperature, labels).ece
    return found, joined, labels


def teachers_yaml(runs: Sequence[Run], weights: Sequence[float]) -> str:
    """The ensemble as a section of a student's recipe."""
    lines = [
        f"  - {{run: {json.dumps(str(run.folder), ensure_ascii=False)}, weight: {weight:g}}}"
        for run, weight in zip(runs, weights, strict=True)
        if weight > 0
    ]
    return "\n".join(
        ["# paste into a student's recipe, with a loss like distill", "teachers:", *lines, ""]
    )


def print_summary(found: dict[str, Any]) -> None:
    log.info(f"weights chosen on {found['weights_chosen_on']}")
    for member in found["members"]:
        log.info(f"  {member['weight']:.4f}  {member['run']}: top1 {member['top1']:.2f} %")
    for pair in found["diversity"]:
        log.info(
            f"  {pair['first']} and {pair['second']} disagree on {pair['disagree']:.1f} %, both wrong "
            f"{pair['both_wrong']:.1f} %, either right {pair['oracle_top1']:.1f} %"
        )
    joined, best = found["ensemble"], found["against_best_member"]
    low, high = joined["top1_interval"]
    log.info(
        f"together: top1 {joined['top1']:.2f} % ({low:.2f} to {high:.2f})  top5 {joined['top5']:.2f} %  "
        f"loss {joined['loss']:.4f}; against {best['run']} p = {best['p']:.2g} (McNemar)"
    )


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "ensemble",
        "Join runs by the weighted mean of their logits. Weights are chosen on held-out rows "
        "(data.val_size, after evaluate), else they are equal. Writes ensemble.json, predictions and "
        "teachers.yaml, a section for a student's recipe.",
        "python -m cifar_dist.ensemble runs/r18_32_s0 runs/r18_32_s1 runs/wrn28_10_32",
        "python -m cifar_dist.ensemble runs/r18_32_s* --uniform --output ensembles/seeds",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="two finished runs or more"
    )
    parser.add_argument("--uniform", action="store_true", help="equal weights, nothing chosen")
    parser.add_argument(
        "--output", type=Path, default=Path("ensemble"), metavar="FOLDER", help="default: ensemble"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier ensemble")
    options = parser.parse_intermixed_args(arguments)

    log_to_terminal()
    folders = list({folder.resolve(): folder for folder in options.runs}.values())
    if len(folders) < 2:
        raise UserError("give two runs or more to join, like runs/a runs/b")
    check_output(options.output, OURS, force=options.force)
    runs = [read_run(folder) for folder in folders]
    found, logits, labels = combine(runs, uniform=options.uniform)
    print_summary(found)
    tensors = {"logits": logits.contiguous(), "labels": labels}
    weights = [member["weight"] for member in found["members"]]
    atomic_write(options.output / "predictions.safetensors", save(tensors))
    atomic_write(options.output / "teachers.yaml", teachers_yaml(runs, weights))
    write_json(options.output / "ensemble.json", found)
    log.info(f"written to {options.output}; teachers.yaml lets it teach")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
