"""A training continues when an elastic agent of torchrun disappears or joins, with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from compare import assert_same_bits
from launcher import Launch, free_port
from restarts import EVERY_STEP

from recipes import RecipeMaker

RUN = {"batch_size": 16, "micro_batches": 8, "eval_every_epochs": 10_000}
RECOVERY_SECONDS = 90
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_WAIT_POLICY": "passive",
    # Otherwise agents announce the address of their store only once, and one that joins waits for it.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@pytest.fixture
def agents() -> Iterator[list[subprocess.Popen[bytes]]]:
    """The agents that a test starts; they are killed at its end."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for agent in started:
        if agent.poll() is None:
            kill_tree(agent.pid)


def start_agent(
    path: Path, *overrides: str, cwd: Path, port: int, log: str
) -> subprocess.Popen[bytes]:
    """Start an agent with two ranks; the first one hosts the rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2"]
    command += ["--max-restarts=100", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command += ["--rdzv-id=run", "--rdzv-conf=last_call_timeout=5", "-m", "cifar_dist.train"]
    with (cwd / log).open("a") as output:
        return subprocess.Popen(
            [*command, str(path), *overrides],
            cwd=cwd,
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, which are in sessions of their own."""
    below = children(pid)
    os.kill(pid, signal.SIGKILL)
    for child in below:
        with suppress(ProcessLookupError):
            kill_tree(child)


def wait_for_start(
    agent: subprocess.Popen[bytes], log: Path, world_size: int, *, starts: int
) -> float:
    """Wait for start number `starts` with this number of processes; return the seconds that it took."""
    began = time.monotonic()
    deadline = began + RECOVERY_SECONDS
    while log.read_text().count(f"{world_size} process(es) on cpu") < starts:
        assert agent.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.fault
@pytest.mark.parametrize("kills", [2])
def test_agents_that_die_and_join_keep_the_bits(
    tmp_path: Path,
    recipe: RecipeMaker,
    agents: list[subprocess.Popen[bytes]],
    kills: int,
) -> None:
    path = recipe(run=RUN | {"epochs": 150 * kills})  # 4 steps per epoch
    port, log, numbers = free_port(), tmp_path / "first.txt", random.Random(kills)
    frequent = f"run.save_every_minutes={EVERY_STEP}"
    first = start_agent(path, "name=elastic", frequent, cwd=tmp_path, port=port, log="first.txt")
    agents.append(first)
    wait_for_start(first, log, 2, starts=1)
    for kill in range(kills):
        second = start_agent(
            path, "name=elastic", frequent, cwd=tmp_path, port=port, log="second.txt"
        )
        agents.append(second)
        wait_for_start(first, log, 4, starts=kill + 1)
        time.sleep(numbers.uniform(1, 6))
        kill_tree(second.pid)
        second.wait()
        print(f"{wait_for_start(first, log, 2, starts=kill + 2):.1f} s after a kill")
    assert first.wait(timeout=600) == 0, log.read_text()
    ranks = Launch("train", [path, "name=straight"], cwd=tmp_path)
    assert ranks.wait(600) == [0], ranks.output
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/elastic")


@pytest.mark.fault
def test_user_error_and_signal_end_the_agent(
    tmp_path: Path, recipe: RecipeMaker, agents: list[subprocess.Popen[bytes]]
) -> None:
    """An agent would start them again, a hundred times."""
    log = tmp_path / "agent.txt"
    path = recipe(run=RUN | {"epochs": 100_000})
    agent = start_agent(path, "optim.lrr=1", cwd=tmp_path, port=free_port(), log="agent.txt")
    assert agent.wait(timeout=60) != 0
    assert log.read_text().count("error: ") == 1, log.read_text()

    agent = start_agent(path, cwd=tmp_path, port=free_port(), log="agent.txt")
    agents.append(agent)
    wait_for_start(agent, log, 2, starts=1)
    time.sleep(5)
    for rank in children(agent.pid):
        os.kill(rank, signal.SIGUSR1)
    assert agent.wait(timeout=60) != 0
    assert "stopped by SIGUSR1" in log.read_text(), log.read_text()
    assert log.read_text().count("2 process(es) on cpu") == 1


@pytest.mark.fault
def test_ranks_of_a_killed_agent_save_and_exit(
    tmp_path: Path, recipe: RecipeMaker, agents: list[subprocess.Popen[bytes]]
) -> None:
    """Orphans would keep the lock of the run."""
    log = tmp_path / "agent.txt"
    path = recipe(run=RUN | {"epochs": 100_000})
    agent = start_agent(path, cwd=tmp_path, port=free_port(), log="agent.txt")
    agents.append(agent)
    wait_for_start(agent, log, 2, starts=1)
    time.sleep(5)
    ranks = children(agent.pid)
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert "stopped by SIGTERM" in log.read_text(), log.read_text()
