"""Conversion of Slurm's environment variables to torch's; pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15000, 17000  # below 32768, where Linux's ephemeral ports begin


def torch_env(environment: Mapping[str, str], *, visible_devices: int) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, ... of one of several tasks of srun, and {} for any other process.

    LOCAL_RANK is modulo the visible devices, because `--gpus-per-task=1` shows each task a single
    GPU with number 0. A batch script has most of srun's variables but is not a task; only srun sets
    SLURM_STEP_NUM_TASKS.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    local_rank = int(environment["SLURM_LOCALID"])
    node = int(environment["SLURM_NODEID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": str(local_rank % visible_devices if visible_devices else local_rank),
        "LOCAL_WORLD_SIZE": str(tasks_of(environment["SLURM_STEP_TASKS_PER_NODE"], node)),
        "MASTER_ADDR": environment.get(
            "MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])
        ),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port(int(environment["SLURM_JOB_ID"])))),
    }


def port(job: int) -> int:
    """Return a port for a job; slurm/train.sh starts at it and takes the first free one."""
    return FIRST_PORT + job % PORTS


def first_host(nodes: str) -> str:
    """Return the first host of a compressed node list: `gpu[03-05,9],login` gives gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def tasks_of(per_node: str, node: int) -> int:
    """Return the number of tasks of a node: `4(x2),1` gives 4 for nodes 0 and 1, and 1 for node 2."""
    counts: list[int] = []
    for part in per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]
