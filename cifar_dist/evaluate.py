"""Evaluate a run's newest checkpoint anew: the same numbers, on any number of processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from cifar_dist.data.arrow import class_names, load_split
from cifar_dist.data.batches import holdout_rows
from cifar_dist.engine import results
from cifar_dist.engine.evaluation import Evaluation, evaluate
from cifar_dist.engine.runtime import (
    Ranks,
    adopt_slurm_ranks,
    end_processes,
    log,
    log_to_terminal,
    start_processes,
)
from cifar_dist.engine.step import check_precision
from cifar_dist.errors import UserError, run_command
from cifar_dist.files import write_json
from cifar_dist.learn.losses import logit_scale
from cifar_dist.recipe import Recipe
from cifar_dist.runs import load_model, load_run


def evaluate_run(
    recipe: Recipe, saved: Path, *, data: Path, split: str, ranks: Ranks, device: torch.device
) -> Evaluation:
    """Evaluate on `test`, `train` or `held-out` rows, exactly as training does it."""
    loaded = load_split(data, "test" if split == "test" else "train", device)
    rows = torch.arange(len(loaded.labels))
    if split == "held-out":
        if not recipe.data.holdout:
            raise UserError("this run held nothing out (data.holdout is 0); use --split test")
        _, rows = holdout_rows(loaded.labels, recipe.data.holdout)
    model = load_model(recipe, saved, len(class_names(data)))
    return evaluate(
        model.to(device).to(memory_format=torch.channels_last),
        loaded,
        rows,
        precision=recipe.run.precision,
        logit_scale=logit_scale(recipe.losses.values()),
        ranks=ranks,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_dist.evaluate",
        description="Evaluate a run's checkpoint exactly, on one process or many.",
        epilog="examples:\n"
        "  python -m cifar_dist.evaluate runs/debug\n"
        "  accelerate launch -m cifar_dist.evaluate runs/r50_224 --output again.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder, like runs/debug")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="like step_00000600; default: the newest"
    )
    parser.add_argument("--split", choices=("test", "train", "held-out"), default="test")
    parser.add_argument("--data", type=Path, help="another place of the same data")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON too")
    options = parser.parse_args(arguments)

    adopt_slurm_ranks()
    log_to_terminal()
    recipe, saved = load_run(options.run, options.checkpoint)
    surroundings = results.read_json(options.run / "environment.json") or {}
    accelerator = start_processes(
        timeout_seconds=recipe.run.timeout_seconds,
        threads=recipe.run.threads or surroundings.get("threads"),  # other threads, other last bits
    )
    check_precision(recipe.run.precision, accelerator.device)
    ranks = Ranks.of(accelerator)
    evaluation = evaluate_run(
        recipe,
        saved,
        data=options.data or Path(recipe.data.path),
        split=options.split,
        ranks=ranks,
        device=accelerator.device,
    )
    numbers = evaluation.metrics
    log.info(
        f"{options.run} at {saved.name}, {options.split}, {len(evaluation.labels):,} rows: "
        f"loss {numbers['loss']:.4f}  top1 {numbers['top1']:.2f} %  top5 {numbers['top5']:.2f} %"
    )
    if ranks.is_main:
        before = options.run / "predictions.safetensors"
        is_final = options.checkpoint is None and options.split == "test"
        if is_final and before.exists():
            same = torch.equal(load_file(before)["logits"], evaluation.logits)
            log.info(f"{'the same bits as' if same else 'other bits than'} {before}")
        if options.output is not None:
            facts = {"run": str(options.run), "checkpoint": saved.name, "split": options.split}
            write_json(options.output, facts | numbers)
    end_processes(accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
