"""Joining and leaving the process group that the launcher prepared.

Accelerate provides launch, process group, device, DDP and no_sync. The recipe decides precision,
accumulation and compilation, so a launcher's settings for these are overridden.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from cifar_dist.distributed import slurm
from cifar_dist.distributed.context import local_world_size
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

# Collectives time out after the watchdog, whose message names rank and step.
COLLECTIVE_GRACE_SECONDS = 10

OVERRIDDEN_VARIABLES = {  # variable of a launcher: (neutral value, key of the recipe)
    "ACCELERATE_MIXED_PRECISION": ("no", "run.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "run.micro_batches"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "run.compile"),
}

UNSUPPORTED_BACKENDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def set_slurm_env() -> None:
    """Set torch's environment variables in a task that plain srun started."""
    os.environ.update(slurm.torch_env(os.environ, visible_devices=torch.cuda.device_count()))


def init_distributed(
    *, timeout_seconds: int, threads: int | None, deterministic: bool = False
) -> Accelerator:
    """Join the launcher's process group, if there is one, and set torch's global options.

    Raises UserError if the number of processes differs from the launcher's WORLD_SIZE.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic  # worth it because shapes are constant
    for name, backend in UNSUPPORTED_BACKENDS.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher's configuration selects {backend}, but recipes train with DDP; "
                "use one of accelerate_configs/"
            )
    for name, (neutral, key) in OVERRIDDEN_VARIABLES.items():
        value = os.environ.get(name, neutral).lower()
        if value != neutral:
            log.info(f"ignoring the launcher's {name}={value}: the recipe decides ({key})")
        os.environ[name] = neutral
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    accelerator = Accelerator(
        mixed_precision="no",  # the training step handles autocast and loss scaling
        cpu=on_cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                timeout=timedelta(seconds=timeout_seconds + COLLECTIVE_GRACE_SECONDS)
            ),
        ],
    )
    if accelerator.num_processes != expected:
        raise UserError(
            f"the launcher started {expected} processes, but Accelerate sees "
            f"{accelerator.num_processes}; use one of accelerate_configs/ or "
            "`torchrun --nproc_per_node N -m cifar_dist.train`"
        )
    torch.set_num_threads(threads or threads_per_process(accelerator.num_processes))
    return accelerator


def threads_per_process(world_size: int) -> int:
    """Return Slurm's CPUs per task, or the machine's CPUs divided by its processes.

    OMP_NUM_THREADS is not used: launchers set it differently, and the number of threads affects
    the last bits of results.
    """
    cpus_per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if cpus_per_task.isdigit():
        return max(1, int(cpus_per_task))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size(world_size))


def destroy_distributed(accelerator: Accelerator) -> None:
    """Leave the process group together; without this some runs exit with a non-zero code."""
    if dist.is_initialized():
        accelerator.wait_for_everyone()
        dist.destroy_process_group()
