"""Stop signals: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C make a run save and stop.

The handler only records the signal; the training loop reads it when the ranks poll each other.
Imported before torch, because a signal kills a Python process that has no handler yet.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from cifar_dist.utils.errors import is_main_rank

STOPPED = 75  # exit code after a stop signal, with everything saved: run the command again
PR_SET_PDEATHSIG = 1  # of prctl
DUPLICATE_SECONDS = 1  # torchrun forwards the terminal's Ctrl-C, so it can arrive twice

_received: list[tuple[int, float]] = []  # (signal number, time)


def install() -> None:
    """Record SIGTERM and SIGUSR1 from now on."""
    stops = (signal.SIGTERM, signal.SIGUSR1)
    for number in stops:
        signal.signal(number, _record)
    signal.pthread_sigmask(  # slurm/train.sh starts tasks with them blocked
        signal.SIG_UNBLOCK, (*stops, signal.SIGINT)
    )


def signal_at_parent_exit() -> None:
    """Let the kernel send this process SIGTERM when its parent exits; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def save_on_interrupt() -> None:
    """Record Ctrl-C as well: from now on a run saves before it stops. A second one quits at once.

    Without `install`, in a notebook, Ctrl-C keeps its meaning.
    """
    if signal.getsignal(signal.SIGTERM) is _record:
        signal.signal(signal.SIGINT, _record)


def _record(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
        interrupts = [when for received, when in _received if received == signal.SIGINT]
        if interrupts and now - interrupts[0] > DUPLICATE_SECONDS:
            raise KeyboardInterrupt
        if not interrupts and is_main_rank():
            message = b"\nsaving after this step; press Ctrl-C again to quit now\n"
            os.write(2, message)  # print is not reentrant
    _received.append((number, now))


def stop_signal() -> int:
    """Return the number of the first stop signal that this process received, or 0."""
    return _received[0][0] if _received else 0
