"""Floor 0. How every command explains itself, and what it does not overwrite."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import NoReturn

from cifar_dist.utils.errors import UserError

RENAMED = {
    "--flips": "--tta-flip",
    "--picture": "--save-image",
    "--dataset": "--rows",
    "--any-content": "--allow-unofficial",
    "--equal": "--uniform",
}


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one sentence, on one rank, as every command does."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, 1)
            if RENAMED.get(word) in self._option_string_actions:
                message += f"; it is now called {RENAMED[word]}"
            elif close:
                message += f"; did you mean {close[0]}"
        raise UserError(f"{message}; `{self.prog} --help` says what there is")


def command_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of `python -m cifar_dist.COMMAND`, with examples below its options."""
    parser = _Parser(
        prog=f"python -m cifar_dist.{command}",
        description=textwrap.fill(description, 80),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a mistyped option is no other one
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error was found"
    )
    return parser


def check_output(folder: Path, names: Set[str], *, force: bool) -> None:
    """Refuse a folder that is there already: for good unless all in it bears our `names`, else unless forced."""
    if folder.exists():
        foreign = not folder.is_dir() or {path.name for path in folder.iterdir()} - names
        if foreign or not force:
            remedy = "choose another --output" if foreign else "choose another --output, or --force"
            raise UserError(f"{folder} is there already; {remedy}")


def add_recipe(parser: argparse.ArgumentParser, meaning: str) -> None:
    """A recipe and changes to it; `parse_intermixed_args` lets options stand between them."""
    parser.add_argument("recipe", type=Path, help=meaning)
    # the default says that none is needed, which an error message would else deny
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="changes to it"
    )
