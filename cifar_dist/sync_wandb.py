"""Rebuild one W&B run from a run's metrics.jsonl, and upload it."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "sync_wandb",
        "Rebuild one W&B run from a run's metrics.jsonl and upload it, if anything is new.",
        "python -m cifar_dist.sync_wandb runs/r18_32",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    folder = parser.parse_args(arguments).run

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.recipe.wandb_sync import sync
    from cifar_dist.utils.log import log_to_terminal

    log_to_terminal()
    sync(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
