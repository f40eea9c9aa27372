"""Logging and progress bars."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from cifar_dist.utils.errors import discard_output, is_main_rank

log = logging.getLogger("cifar_dist")


class _TqdmHandler(logging.Handler):
    """Print records to stdout without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has exited, as `head` does; keep working
            discard_output(sys.stdout)


def log_to_terminal() -> None:
    """Print log records: all of rank 0, only warnings of other ranks."""
    if not log.handlers:
        log.addHandler(_TqdmHandler())
    log.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    log.propagate = False


def progress_bar(done: int, total: int, *, enabled: bool, unit: str = "step") -> tqdm:
    """Return a progress bar, which prints only if `enabled` and stderr is a terminal."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        disable=None if enabled else True,  # None: disable without a terminal
    )
