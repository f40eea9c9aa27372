"""What Slurm says about a task -> what torch wants to know about a rank. Pure functions of the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15000, 17000  # below 32768, where Linux begins to give out ports by itself


def torch_env(environment: Mapping[str, str], *, visible_devices: int) -> dict[str, str]:
    """RANK, WORLD_SIZE, ... of one of several tasks that srun started; {} for any other process.

    A device is the local rank modulo the devices that the task sees: `--gpus-per-task=1` shows each
    task one GPU, as its number 0; other options show each task all GPUs of its node. A batch script
    has most of srun's variables, but is no task: only srun sets SLURM_STEP_NUM_TASKS.
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
    """A port of the job's own; slurm/train.sh begins there and takes the next one that is free."""
    return FIRST_PORT + job % PORTS


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form: `gpu[03-05,9],login` is gpu03."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def tasks_of(per_node: str, node: int) -> int:
    """The tasks of one node in Slurm's short form: in `4(x2),1` nodes 0 and 1 have 4, node 2 has 1."""
    counts: list[int] = []
    for part in per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]
