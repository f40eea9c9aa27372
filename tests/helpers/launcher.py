"""Run a command with real ranks: processes connected by gloo, forked from a server.

The fork server has imported torch, so a rank starts in 0.1 s.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from cifar_dist.distributed.local_launch import rank_environment

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # ranks share the cores
context = multiprocessing.get_context("forkserver")
PORTS = itertools.count(os.getpid())  # concurrent test sessions start at different ports
COMMANDS = ("train", "evaluate", "cache_logits", "doctor")
context.set_forkserver_preload(  # commands import these after parsing
    [
        *("cifar_dist.train", "cifar_dist.inference.evaluate_run"),
        *("cifar_dist.inference.logit_caching", "cifar_dist.training.launch_check"),
        "torch._dynamo",
    ]
)


def _run_rank(
    command: str, arguments: list[str], environment: dict[str, str], cwd: str, output: str
) -> None:
    gc.freeze()  # a collection would copy the pages shared with the fork server
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [command, *arguments]
    from cifar_dist.distributed import signals
    from cifar_dist.utils.errors import run_command

    signals.install()
    sys.exit(run_command(importlib.import_module(command).main))


def free_port() -> int:
    """Return a free port below the kernel's ephemeral ports, another one at each call."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in PORTS:
        port = 20_000 + 1000 * (worker % 12) + number % 1000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError  # PORTS is infinite


def start_rank(
    arguments: Sequence[object], *, cwd: Path, rank: int, world_size: int, port: int
) -> subprocess.Popen[str]:
    """Start one rank in a new interpreter: `python ARGUMENTS...`."""
    return subprocess.Popen(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1", **os.environ, **rank_variables(rank, world_size, port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank on this machine's CPU."""
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive"}
    return rank_environment(rank, world_size, port) | cpu


class Launch:
    """The processes of one launch; `output` is the combined output of all ranks.

    `command` is one of COMMANDS, or a module that has a `main(arguments)`.
    """

    def __init__(
        self,
        command: str,
        arguments: Sequence[object],
        *,
        cwd: Path,
        world_size: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = cwd / f"output_{time.monotonic_ns()}.txt"
        port = free_port()
        module = f"cifar_dist.{command}" if command in COMMANDS else command
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            variables = rank_variables(rank, world_size, port) | (environment or {})
            process = context.Process(
                target=_run_rank,
                args=(module, [str(a) for a in arguments], variables, str(cwd), str(self.log)),
            )
            process.start()
            self.processes.append(process)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Return the exit codes; kill ranks that do not end in time and fail the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not late, f"{len(late)} ranks did not end in {seconds} s:\n{self.output}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def train(
    *arguments: object,
    cwd: Path,
    world_size: int = 1,
    expect: int = 0,
    environment: dict[str, str] | None = None,
) -> str:
    """Run the train command, assert the exit code of all ranks, and return their output."""
    ranks = Launch("train", arguments, cwd=cwd, world_size=world_size, environment=environment)
    codes = ranks.wait()
    assert codes == [expect] * world_size, f"exit codes {codes}:\n{ranks.output}"
    return ranks.output


def weight_hashes(recipe: Path, *, cwd: Path) -> list[str]:
    """Train a recipe on two ranks, and return the SHA-256 of each rank's weights."""
    script, port = Path(__file__).with_name("rank_hashes.py"), free_port()
    processes = [
        start_rank([script, recipe], cwd=cwd, rank=rank, world_size=2, port=port)
        for rank in range(2)
    ]
    return [process.communicate(timeout=120)[0].split()[-1] for process in processes]
