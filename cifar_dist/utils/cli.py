"""Argument parsing shared by all commands."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import NoReturn

from cifar_dist import __version__
from cifar_dist.utils.errors import UserError, exit_on_interrupt, run_command
from cifar_dist.utils.recipe_files import find_recipe
from cifar_dist.utils.suggest import closest

RECIPE_HELP = "a YAML file, or a name that `cifar-dist recipes` lists"
RENAMED = {
    "--flips": "--tta-flip",
    "--picture": "--save-image",
    "--dataset": "--rows",
    "--any-content": "--allow-unofficial",
    "--equal": "--uniform",
}


class _Parser(argparse.ArgumentParser):
    """Parser that raises UserError, so that only rank 0 prints it."""

    def error(self, message: str) -> NoReturn:
        unrecognized = message.partition("unrecognized arguments: ")[2].split()
        if option := next((word for word in unrecognized if word.startswith("-")), ""):
            option = option.partition("=")[0]
            if RENAMED.get(option) in self._option_string_actions:
                message += f"; it is now called {RENAMED[option]}"
            elif near := closest(option, self._option_string_actions):
                message += f"; did you mean {near}?"
        raise UserError(f"{message}; see `{self.prog} --help`")


def command_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m cifar_dist.COMMAND`, with examples below its options."""
    parser = _Parser(
        prog=f"python -m cifar_dist.{command}",
        description=textwrap.fill(description, 80),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelled option must not select another one
    )
    parser.add_argument(
        "--traceback", action="store_true", help="print a traceback with an error message"
    )
    return parser


def add_recipe(parser: argparse.ArgumentParser, recipe_help: str = RECIPE_HELP) -> None:
    """Add a recipe and its overrides, which `parse_recipe` parses."""
    parser.add_argument("recipe", help=recipe_help)
    # Without a default, argparse would list `overrides` among the missing arguments.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="recipe overrides"
    )


def parse_recipe(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse a command line with a recipe; return its options with `recipe` and `overrides`.

    Recipe, overrides and options may come in any order. UserError if the recipe does not exist.
    """
    options = parser.parse_intermixed_args(arguments)
    words = [options.recipe, *options.overrides]
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        parser.error(f"give one recipe (found: {found}); overrides have the form section.key=value")
    if vars(options).get("dry_run") is False and (options.time or options.json):
        parser.error("--time and --json need --dry-run")
    if vars(options).get("dry_run") and options.fork:
        parser.error("--dry-run cannot be combined with --fork; remove one of them")
    options.recipe = find_recipe(names[0])
    options.overrides = [word for word in words if "=" in word]
    return options


def parse_early(parser: argparse.ArgumentParser) -> None:
    """Exit here for `--help`, `--version` or a mistake: before a command's slow imports.

    Afterwards Ctrl-C exits without a traceback until `run_command` takes over.
    """

    def parse(arguments: list[str]) -> int:
        parse_recipe(parser, arguments)
        return 0

    if code := run_command(parse):
        sys.exit(code)
    signal.signal(signal.SIGINT, exit_on_interrupt)


def train_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Train a recipe on one process or many. The same command resumes a stopped run.",
        "cifar-dist train recipes/debug.yaml --processes 2",
        "python -m cifar_dist.train recipes/debug.yaml",
        "accelerate launch -m cifar_dist.train recipes/r50_224.yaml run.epochs=20",
        "accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml -m cifar_dist.train "
        "recipes/r50_224.yaml name=r50_224_s1 run.seed=1",
    )
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its cost, and exit"
    )
    parser.add_argument(
        "--time", action="store_true", help="with --dry-run: train a few steps to estimate the time"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.add_argument(
        "--fork",
        type=Path,
        metavar="RUN",
        help="start a new run (name=...) from the newest checkpoint of another run",
    )
    parser.add_argument("--version", action="version", version=f"cifar_dist {__version__}")
    return parser


def check_output(folder: Path, names: Set[str], *, force: bool) -> None:
    """Raise UserError if `folder` exists.

    With `force` a folder may exist if everything in it is called one of `names`.
    """
    if folder.exists():
        foreign = not folder.is_dir() or {path.name for path in folder.iterdir()} - names
        if foreign or not force:
            remedy = "choose another --output" + ("" if foreign else ", or add --force")
            raise UserError(f"{folder} already exists; {remedy}")
