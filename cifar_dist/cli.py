"""The console script: `cifar-dist COMMAND ...` is `python -m cifar_dist.COMMAND ...`.

Imports neither torch nor anything slow. `--processes` starts several processes on this machine, without
the traceback that other launchers print below an error message.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from cifar_dist import __version__
from cifar_dist.distributed.local_launch import count_gpus, launch
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.recipe_files import (
    RECIPES,
    apply_override,
    find_recipe,
    read_yaml,
    recipe_names,
)
from cifar_dist.utils.suggest import closest

COMMANDS = {
    "train": "train a recipe, or resume it",
    "prepare": "convert CIFAR-100 for training",
    "runs": "list runs: state, progress, accuracy, time left",
    "sweep": "choose hyper-parameters on validation rows",
    "evaluate": "evaluate a checkpoint of a run",
    "report": "compare runs in an HTML page",
    "predict": "classify images",
    "export": "write a run as timm, ONNX, torch.export or teacher",
    "ensemble": "combine the predictions or the weights of runs",
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
            f"{', '.join(DISTRIBUTED)} accept --processes N, the number of processes to start on",
            "this machine (default: 1), or --processes auto: one per GPU, or two on a CPU.",
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


def take_processes(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the value of `--processes N`, 1 if it is missing, and the other arguments."""
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--processes":
            value = value if equals else "".join(arguments[index + 1 : index + 2])
            return value, arguments[:index] + arguments[index + (1 if equals else 2) :]
    return "1", arguments


def choose_processes(asked: str, arguments: list[str], gpus: int) -> int:
    """Return the number of processes; `auto` is one per GPU or two on a CPU, at most micro-batches."""
    if asked == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return min(gpus or min(2, cores), micro_batches(arguments) or sys.maxsize)
    if not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--processes needs a number of at least 1, or auto (got {asked!r})")
    if gpus and int(asked) > gpus:
        raise UserError(f"--processes {asked}: this machine has {gpus} GPU(s)")
    return int(asked)


def micro_batches(arguments: list[str]) -> int | None:
    """Return `run.micro_batches` of the recipe in a command line, or None; the command checks both."""
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    for word in arguments:
        with suppress(UserError, LookupError, TypeError):  # not a recipe, or without the key
            raw = read_yaml(find_recipe(word))
            for override in overrides:
                apply_override(raw, override)
            value = raw["run"]["micro_batches"]
            return value if isinstance(value, int) and value > 0 else None
    return None


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
    asked, rest = take_processes(rest)
    under_launcher = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    gpus = count_gpus() if asked != "1" and not under_launcher else 0
    processes = 1 if under_launcher else choose_processes(asked, rest, gpus)
    if processes == 1:
        os.execv(sys.executable, [*command, *rest])
    return launch([*command, *rest], processes, on_cpu=not gpus)


def main() -> None:
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
