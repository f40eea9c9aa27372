"""Evaluate a checkpoint of a run; the result has the same bits on any number of processes."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, is_main_rank, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "evaluate",
        "Evaluate a run's checkpoint exactly, on one process or many. Writes evaluation.json, "
        "classes.csv and two confusion tables to RUN/evaluation.",
        "python -m cifar_dist.evaluate runs/debug",
        "accelerate launch -m cifar_dist.evaluate runs/r50_224 --cifair ciFAIR-100",
        "python -m cifar_dist.evaluate runs/r18_32 --tta-flip --output with_flips",
        "python -m cifar_dist.evaluate runs/r18_32 --corruptions --ood data/other",
    )
    parser.add_argument("run", type=Path, help="run folder, like runs/debug")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="like step_00000600 (default: the newest)"
    )
    parser.add_argument(
        "--split", choices=("test", "train", "val"), default="test", help="default: test"
    )
    parser.add_argument(
        "--tta-flip",
        action="store_true",
        help="average the logits of each image and its mirror image; takes twice as long",
    )
    parser.add_argument(
        "--cifair", type=Path, metavar="FOLDER", help="also evaluate on ciFAIR-100 (folder or zip)"
    )
    parser.add_argument(
        "--corruptions",
        nargs="?",
        const="generated",
        metavar="FOLDER",
        help="also evaluate on corrupted test images: on 14 of the 15 kinds of CIFAR-100-C at five "
        "severities, generated, or on its published files in FOLDER",
    )
    parser.add_argument(
        "--ood",
        type=Path,
        metavar="FOLDER",
        help="also measure how well the test images are told from those of another prepared data set",
    )
    parser.add_argument(
        "--near-duplicates",
        type=Path,
        metavar="FILE",
        help="list written by cifar_dist.near_duplicates (default: the one for CIFAR-100)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of the data, if it has moved; other data also needs --output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: RUN/evaluation for the newest checkpoint on the test split without "
        "--tta-flip; otherwise nothing is written",
    )
    options = parser.parse_args(arguments)
    check_robustness_options(options.corruptions, options.ood, options.split)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.distributed.context import DistContext
    from cifar_dist.distributed.launch import set_slurm_env
    from cifar_dist.inference.evaluate_run import (
        evaluate_run,
        log_evaluation,
        plan_evaluation,
        store_evaluation,
    )
    from cifar_dist.recipe.session import distributed_session
    from cifar_dist.utils.files import check_writable
    from cifar_dist.utils.log import log_to_terminal

    set_slurm_env()
    log_to_terminal()
    job = plan_evaluation(
        options.run,
        checkpoint=options.checkpoint,
        split=options.split,
        tta_flip=options.tta_flip,
        data=options.data,
        corruptions=options.corruptions,
        ood=options.ood,
        output=options.output,
    )
    if job.output is not None and is_main_rank():
        check_writable(job.output / "evaluation.json")
    with distributed_session(job.recipe, threads=job.threads) as accelerator:
        context = DistContext.of(accelerator)
        evaluation = evaluate_run(
            job,
            cifair=options.cifair,
            near_duplicates=options.near_duplicates,
            context=context,
            device=accelerator.device,
        )
        log_evaluation(job, evaluation)
        if context.is_main:
            store_evaluation(job, evaluation)
    return 0


def check_robustness_options(corruptions: str | None, ood: Path | None, split: str) -> None:
    """Raise UserError if a folder of --corruptions or --ood does not exist, or with another split."""
    folders = {"--corruptions": corruptions, "--ood": ood}
    for option, folder in folders.items():
        if folder is not None and split != "test":
            raise UserError(f"{option} needs the test split; remove it, or --split {split}")
        if folder not in (None, "generated") and not Path(folder).is_dir():
            raise UserError(f"{option} {folder}: is not a folder; give an existing one")


if __name__ == "__main__":
    sys.exit(run_command(main))
