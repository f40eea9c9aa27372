"""Floor 0. SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C ask a run to save and stop.

A handler only takes a note; the loop reads it where all ranks agree (distributed/context.py). Imported
and installed before torch, since a signal kills a Python process that has no handler yet.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

STOPPED = 75  # exit code of a command that a signal stopped and that was saved: start it again
DUPLICATE_SECONDS = 5  # launchers pass a terminal's Ctrl-C on, so it arrives twice within moments

_received: list[tuple[int, float]] = []  # (number, when): a process has one set of handlers


def install() -> None:
    """Note the stop signals from now on. A second Ctrl-C, 5 s later, stops without saving."""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in stops:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)  # Slurm scripts start tasks with USR1 blocked


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and _received and now - _received[0][1] > DUPLICATE_SECONDS:
        raise KeyboardInterrupt
    _received.append((number, now))


def stop_signal() -> int:
    """The number of the first stop signal that this process got, or 0."""
    return _received[0][0] if _received else 0
