"""Floor 0. SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C ask a run to save and stop.

A handler only takes a note; the loop reads it where all ranks agree (engine/runtime.py). Imported
and installed before torch, since a signal kills a Python process that has no handler yet.
"""

from __future__ import annotations

import signal
from types import FrameType

_received: list[str] = []  # a process has one set of signal handlers, hence one list


def install() -> None:
    """Note the stop signals from now on. A second Ctrl-C stops at once, without saving."""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in stops:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)  # Slurm scripts start tasks with USR1 blocked


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _received:
        raise KeyboardInterrupt
    _received.append(name)


def received() -> str | None:
    """The name of the first stop signal that this process got, or None."""
    return _received[0] if _received else None
