"""The console script: `cifar-dist COMMAND ...` is `python -m cifar_dist.COMMAND ...`.

Imports only the standard library. `--processes` starts several processes on this machine, without
the traceback that other launchers print below an error message.
"""

from __future__ import annotations

import os
import sys

from cifar_dist import __version__
from cifar_dist.distributed.local_launch import count_gpus, launch
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.recipe_files import RECIPES, recipe_names
from cifar_dist.utils.suggest import closest

COMMANDS = {
    "train": "train a recipe, or resume it",
    "prepare": "convert CIFAR-100 for training",
    "evaluate": "evaluate a checkpoint of a run",
    "report": "compare runs in an HTML page",
    "predict": "classify images",
    "export": "write a run as timm, ONNX, torch.export or teacher",
    "ensemble": "combine the predictions of runs",
    "cache_logits": "store the logits of a recipe's teachers",
    "doctor": "check a launch before a training starts",
    "near_duplicates": "find near-duplicates between train and test",
    "sync_wandb": "upload offline runs to W&B",
}
DISTRIBUTED = ("train", "evaluate", "cache_logits", "doctor")


def usage() -> str:
    rows = [*COMMANDS.items(), ("recipes", "list the recipes that come with cifar_dist")]
    return "\n".join(
        [
            "usage: cifar-dist COMMAND ...",
            "",
            *(f"  {name:<16} {description}" for name, description in rows),
            "",
            "`cifar-dist COMMAND --help` describes a command.",
            f"{', '.join(DISTRIBUTED)} accept --processes N: start N processes on this machine",
            "(default: 1).",
        ]
    )


def list_recipes() -> str:
    """Return one line for each recipe: its name and the first line of its comment."""
    names = recipe_names()
    width = max(len(name) for name in names)
    rows = []
    for name in names:
        lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
        comments = (line[2:] for line in lines if line.startswith("# ") and "$schema" not in line)
        rows.append(f"{name:<{width}}  {next(comments, '')}")
    return "\n".join(rows)


def take_processes(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Return the value of `--processes N`, and the other arguments."""
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != "--processes":
            continue
        value = value if equals else "".join(arguments[index + 1 : index + 2])
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"--processes needs a number of at least 1 (got {value or 'nothing'})")
        return int(value), arguments[:index] + arguments[index + (1 if equals else 2) :]
    return None, arguments


def run(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"cifar_dist {__version__}")
        return 0
    if name == "recipes":
        print(list_recipes())
        return 0
    if name not in COMMANDS:
        near = closest(name, [*COMMANDS, "recipes"])
        hint = f"did you mean {near}?" if near else "`cifar-dist --help` lists the commands"
        raise UserError(f"{name}: unknown command; {hint}")
    command = [sys.executable, "-m", f"cifar_dist.{name}"]
    if name not in DISTRIBUTED:
        os.execv(sys.executable, [*command, *rest])
    processes, rest = take_processes(rest)
    under_launcher = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if processes is None or processes == 1 or under_launcher:
        os.execv(sys.executable, [*command, *rest])
    gpus = count_gpus()
    if gpus and processes > gpus:
        raise UserError(f"--processes {processes}: this machine has {gpus} GPU(s)")
    return launch([*command, *rest], processes, on_cpu=not gpus)


def main() -> None:
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
