"""The log, and the progress bar on a terminal."""

from __future__ import annotations

import logging
import os
import sys

from tqdm import tqdm

from cifar_dist.utils.errors import is_main_rank

log = logging.getLogger("cifar_dist")


def log_to_terminal() -> None:
    """Rank 0 tells what happens, line by line around its progress bar; other ranks only warn."""

    class AroundTheBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                tqdm.write(self.format(record), file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # who read it, like `head`, has seen enough; the work goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if not log.handlers:
        log.addHandler(AroundTheBar())
    log.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    log.propagate = False


def progress_bar(done: int, total: int, *, shown: bool, unit: str = "step") -> tqdm:
    """A bar on rank 0 of a terminal, nothing elsewhere."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        disable=None if shown else True,  # None: only on a terminal
    )
