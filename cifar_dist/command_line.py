"""Floor 0. How every command explains itself."""

from __future__ import annotations

import argparse
import textwrap


def command_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of `python -m cifar_dist.COMMAND`, with examples below its options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m cifar_dist.{command}",
        description=textwrap.fill(description, 80),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error was found"
    )
    return parser
