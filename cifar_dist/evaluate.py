"""Evaluate a run's newest checkpoint anew: the same numbers, on any number of processes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cifar_dist.data.batches import split_train_val
from cifar_dist.data.dataset import Hierarchy, data_digest, load_split, read_hierarchy
from cifar_dist.data.ingest.cifair import cifair_split
from cifar_dist.data.ingest.near_duplicates import read_list
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import propagate_errors
from cifar_dist.distributed.launch import init_distributed, set_slurm_env
from cifar_dist.evaluation import report
from cifar_dist.evaluation.evaluator import EvalResult, FlipTTA, evaluate
from cifar_dist.losses.classification import logit_scale
from cifar_dist.recipe.runs import load_model, load_run
from cifar_dist.recipe.schema import Recipe
from cifar_dist.reporting.comparison import read_logits
from cifar_dist.run_folder import results
from cifar_dist.run_folder.evaluations import EVALUATION_FOLDER, same_data
from cifar_dist.tracking.background_jobs import track_evaluation
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, is_main_rank, run_command
from cifar_dist.utils.files import check_writable
from cifar_dist.utils.log import log, log_to_terminal
from cifar_dist.utils.precision import check_precision


def build_report(
    evaluation: EvalResult,
    hierarchy: Hierarchy,
    *,
    held_out: EvalResult | None,
    duplicates: dict[str, Any] | None,
    cifair: tuple[EvalResult, bool] | None,
) -> dict[str, Any]:
    """All numbers of evaluation.json that come from predictions; None where there is nothing to say."""
    logits, labels = evaluation.logits, evaluation.labels
    found = report.compute_metrics(logits, labels, hierarchy)
    found |= {"temperature": None, "without_near_duplicates": None, "cifair": None}
    if held_out is not None:
        fitted = report.fitted_temperature(held_out.logits, held_out.labels)
        found["temperature"] = fitted | report.after_temperature(logits, labels, fitted["value"])
    if duplicates is not None:
        found["without_near_duplicates"] = {
            **report.excluding_rows(logits, labels, duplicates["test_rows"]),
            "found_by": {name: duplicates[name] for name in ("min_detail", "min_layout")},
            "note": "our own search, a lower bound: ciFAIR lists 891",
        }
    if cifair is not None:
        fair, published = cifair
        found["cifair"] = {"rows": len(fair.labels), "published": published, **fair.metrics}
    return found


def print_summary(found: dict[str, Any], where: str) -> None:
    """The headline and what stands beside it, for the terminal."""
    interval = found["top1_interval"]
    log.info(
        f"{where}: loss {found['loss']:.4f}  top1 {found['top1']:.2f} %  top5 {found['top5']:.2f} %"
    )
    log.info(
        f"  95 % interval of top1 {interval['low']:.2f} to {interval['high']:.2f} %  superclass "
        f"{found['superclass_top1']:.2f} %  errors inside the superclass "
        f"{found['errors_inside_superclass']:.2f} %, outside {found['errors_outside_superclass']:.2f} %"
    )
    line = f"  calibration error {found['calibration']['ece']:.2f} %"
    if found["temperature"]:
        line += f"; at temperature {found['temperature']['value']:.3f}, fitted on held-out rows, "
        line += f"{found['temperature']['ece']:.2f} %"
    log.info(line)
    if found["without_near_duplicates"]:
        less = found["without_near_duplicates"]
        rest = "nothing is left" if less["top1"] is None else f"{less['top1']:.2f} %"
        log.info(f"  without {less['num_excluded']} near-duplicates of training pictures {rest}")
    if found["cifair"]:
        published = "" if found["cifair"]["published"] else " (not the published file)"
        log.info(f"  ciFAIR-100{published}: top1 {found['cifair']['top1']:.2f} %")


def evaluate_run(
    recipe: Recipe,
    saved: Path,
    *,
    data: Path,
    split: str,
    flips: bool,
    cifair: Path | None,
    duplicates: Path | None,
    context: DistContext,
    device: torch.device,
) -> tuple[EvalResult, EvalResult | None, dict[str, Any], Hierarchy]:
    """Evaluate on `test`, `train` or `held-out` rows, exactly as training does it, and look closer.

    Beside the rows that were asked for, the held-out ones are evaluated if the run has some.
    """
    hierarchy = read_hierarchy(data)
    trained = load_model(recipe, saved, len(hierarchy.fine)).to(device)
    model = trained.to(memory_format=torch.channels_last)
    look = partial(
        evaluate,
        FlipTTA(model) if flips else model,
        precision=recipe.run.precision,
        logit_scale=logit_scale(recipe.losses.values()),
        context=context,
        show_progress=True,
    )
    held = None
    if recipe.data.val_size:
        train_split = load_split(data, "train", device, recipe.data.place)
        _, held_rows = split_train_val(train_split.labels, recipe.data.val_size)
        held = look(train_split, held_rows)
    elif split == "val":
        raise UserError("this run held nothing out (data.val_size is 0); use --split test")
    if split == "val":
        assert held is not None
        found = build_report(held, hierarchy, held_out=None, duplicates=None, cifair=None)
        return held, held, found, hierarchy
    loaded = load_split(data, "test" if split == "test" else "train", device, recipe.data.place)
    rows = torch.arange(len(loaded.labels))
    if split == "train" and recipe.data.val_size:  # what it was trained on
        rows, _ = split_train_val(loaded.labels, recipe.data.val_size)
    evaluation = look(loaded, rows)
    other = None
    if cifair is not None:
        fair, published = cifair_split(cifair, data, device)
        other = look(fair, torch.arange(len(fair.labels))), published
    known = read_list(data, duplicates) if split == "test" else None
    found = build_report(evaluation, hierarchy, held_out=held, duplicates=known, cifair=other)
    return evaluation, held, found, hierarchy


def compare(run: Path, evaluation: EvalResult, *, mends: bool) -> None:
    """Say whether the run's own predictions are the same bits; write lost ones anew if it `mends`."""
    path = run / "predictions.safetensors"
    try:
        stored = read_logits(path)
    except UserError:
        stored = None
    if stored is not None:
        same = torch.equal(stored[0], evaluation.logits)
        log.info(f"{'the same bits as' if same else 'other bits than'} {path}")
    elif mends:
        results.write_predictions(run, evaluation)
        log.info(f"{path} was missing or damaged; written anew")


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "evaluate",
        "Evaluate a run's checkpoint exactly, on one process or many. Writes evaluation.json, "
        "classes.csv and two confusions to RUN/evaluation.",
        "python -m cifar_dist.evaluate runs/debug",
        "accelerate launch -m cifar_dist.evaluate runs/r50_224 --cifair ciFAIR-100",
        "python -m cifar_dist.evaluate runs/r18_32 --tta-flip --output with_flips",
    )
    parser.add_argument("run", type=Path, help="a run folder, like runs/debug")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="like step_00000600; default: the newest"
    )
    parser.add_argument(
        "--split", choices=("test", "train", "val"), default="test", help="default: test"
    )
    parser.add_argument(
        "--tta-flip",
        action="store_true",
        help="mean logits of each picture and its mirror image; twice the work, labelled as such",
    )
    parser.add_argument(
        "--cifair", type=Path, metavar="FOLDER", help="ciFAIR-100 or its zip: a further test set"
    )
    parser.add_argument(
        "--near-duplicates", type=Path, metavar="FILE", help="a list of cifar_dist.near_duplicates"
    )
    parser.add_argument(
        "--data", type=Path, help="another place of the run's data; other data need an --output"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: RUN/evaluation, if it is the headline",
    )
    options = parser.parse_args(arguments)

    set_slurm_env()
    log_to_terminal()
    recipe, saved = load_run(options.run, options.checkpoint)
    data = options.data or Path(recipe.data.path)
    surroundings = results.read_facts(options.run, "environment.json")
    summary = results.read_facts(options.run, "summary.json")
    is_same_data = same_data(surroundings, data)
    is_headline = options.checkpoint is None and options.split == "test" and not options.tta_flip
    headline = options.run / EVALUATION_FOLDER
    output = options.output or (headline if is_headline else None)
    to_headline = output is not None and output.resolve() == headline.resolve()
    if to_headline and not is_same_data:
        raise UserError(
            f"{data} holds other data than {options.run} was trained on; to evaluate on them all the "
            "same, give another place with --output"
        )
    if to_headline and not is_headline:
        raise UserError(
            f"{headline} is for the newest checkpoint on the test split, without flips; "
            "choose another --output"
        )
    if output is not None and is_main_rank():
        check_writable(output / "evaluation.json")
    accelerator = init_distributed(
        timeout_seconds=recipe.run.timeout_seconds,
        threads=recipe.run.threads or surroundings.get("threads"),  # other threads, other last bits
    )
    with propagate_errors(accelerator):
        check_precision(recipe.run.precision, accelerator.device)
        context = DistContext.of(accelerator)
        evaluation, held, found, hierarchy = evaluate_run(
            recipe,
            saved,
            data=data,
            split=options.split,
            flips=options.tta_flip,
            cifair=options.cifair,
            duplicates=options.near_duplicates,
            context=context,
            device=accelerator.device,
        )
        with_flips = ", mean of each picture and its mirror image" if options.tta_flip else ""
        other_data = "" if is_same_data else f" of other data ({data})"
        where = f"{options.run} at {saved.name}, {options.split}, {len(evaluation.labels):,} rows"
        print_summary(found, where + other_data + with_flips)
        if context.is_main:
            if is_headline and is_same_data:
                is_last = saved.name == results.last_checkpoint(summary)
                compare(options.run, evaluation, mends=is_last and bool(summary.get("finished")))
            if output is not None:
                facts = {
                    "run": recipe.name,
                    "checkpoint": saved.name,
                    "split": options.split,
                    "tta": "flip" if options.tta_flip else "one view",
                    "data": data_digest(data),
                }
                found = facts | found
                if held is not None:  # first, as evaluation.json says of which checkpoint it is
                    report.write_val_predictions(output, held.logits, held.labels)
                report.write_evaluation(
                    output, found, evaluation.logits, evaluation.labels, hierarchy
                )
                log.info(f"written to {output}")
                if to_headline:
                    track_evaluation(
                        recipe.tracking,
                        options.run,
                        name=recipe.name,
                        found=found,
                        evaluation=evaluation,
                        data=data,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
