"""Stop signals: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C make a run save and stop.

The handler only records the signal; the training loop reads it when the ranks poll each other.
Imported before torch, because a signal kills a Python process that has no handler yet.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

STOPPED = 75  # exit code after a stop signal, with everything saved: run the command again
DUPLICATE_SECONDS = 5  # launchers forward the terminal's Ctrl-C, so it arrives twice

_received: list[tuple[int, float]] = []  # (signal number, time)


def install() -> None:
    """Record stop signals from now on. A second Ctrl-C, 5 s later, stops without saving."""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in stops:
        signal.signal(number, _record)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, stops
    )  # slurm/train.sh starts tasks with them blocked


def _record(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and _received and now - _received[0][1] > DUPLICATE_SECONDS:
        raise KeyboardInterrupt
    _received.append((number, now))


def stop_signal() -> int:
    """Return the number of the first stop signal that this process received, or 0."""
    return _received[0][0] if _received else 0
