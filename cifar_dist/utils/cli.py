"""Argument parsing shared by all commands."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import NoReturn

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.suggest import closest

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


def add_recipe(parser: argparse.ArgumentParser, recipe_help: str) -> None:
    """Add a recipe and its overrides; use `parse_intermixed_args` to allow options between them."""
    parser.add_argument("recipe", type=Path, help=recipe_help)
    # Without a default, argparse would list `overrides` among the missing arguments.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="recipe overrides"
    )


def check_output(folder: Path, names: Set[str], *, force: bool) -> None:
    """Raise UserError if `folder` exists.

    With `force` a folder may exist if everything in it is called one of `names`.
    """
    if folder.exists():
        foreign = not folder.is_dir() or {path.name for path in folder.iterdir()} - names
        if foreign or not force:
            remedy = "choose another --output" + ("" if foreign else ", or add --force")
            raise UserError(f"{folder} already exists; {remedy}")
