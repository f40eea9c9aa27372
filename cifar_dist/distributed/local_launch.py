"""Start the ranks of a command on this machine: `cifar-dist train RECIPE --processes N`.

Imports only the standard library, so that the ranks start at once. Signals are passed on to all
ranks, and the exit code is that of the first rank that failed. Other launchers print a traceback of
their own below the error message of a rank.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from cifar_dist.distributed.signals import signal_at_parent_exit
from cifar_dist.utils.errors import print_error

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
EXIT_SECONDS = (
    60  # for the other ranks, after the first one has failed; they normally exit by themselves
)
POLL_SECONDS = 0.05


def count_gpus() -> int:
    """Return how many GPUs torch can use; torch is imported only on a machine that may have some."""
    if not (
        glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd") or shutil.which("nvidia-smi")
    ):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torch and Accelerate read, with all ranks on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def launch(command: Sequence[str], world_size: int, *, on_cpu: bool) -> int:
    """Run `command` as ranks 0 to world_size - 1 and return the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # each rank sets its number of threads
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    previous = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until all ranks can get them
    for number in FORWARDED:
        signal.signal(number, forward)
    processes += [
        subprocess.Popen(
            command,
            env=environment | rank_environment(rank, world_size, port),
            start_new_session=True,  # the terminal's Ctrl-C arrives once: through `forward`
            preexec_fn=_prepare_rank,
        )
        for rank in range(world_size)
    ]
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return _wait(processes)


def _prepare_rank() -> None:
    """Make a rank stop if this process is killed, and let it receive signals."""
    signal_at_parent_exit()
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; after the first failure, kill those that do not exit in time."""
    code, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]) or (not code and any(codes)):
        if not code and any(codes):
            code = next(one for one in sorted(codes, key=lambda one: one or 0) if one)
            deadline = time.monotonic() + EXIT_SECONDS
            if code < 0:  # a signal ended it
                name = signal.Signals(-code).name
                hint = "; check the machine's memory" if name == "SIGKILL" else ""
                print_error(f"rank {codes.index(code)} was ended by {name}{hint}")
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)
    return 128 - code if code < 0 else code
