"""Join the process group that the launcher prepared, and leave it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cifar_dist.distributed import slurm
from cifar_dist.distributed.context import local_world_size
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

COLLECTIVE_GRACE_SECONDS = (
    10  # collectives give up later than the watchdog, which knows rank and step
)


# What launchers put into the environment and the recipe decides: variable -> (neutral, remedy).
OVERRIDDEN_VARIABLES = {
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
    """Under plain srun, tell torch what Slurm knows."""
    os.environ.update(slurm.torch_env(os.environ, visible_devices=torch.cuda.device_count()))


def init_distributed(
    *, timeout_seconds: int, threads: int | None, deterministic: bool = False
) -> Accelerator:
    """Join the process group that the launcher prepared (or be alone) and check that it is whole.

    Raises UserError when this process believes in another number of processes than its launcher.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes stay, so the fastest pays
    for name, what in UNSUPPORTED_BACKENDS.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher's configuration asks for {what}, but recipes train with DDP; "
                "use one of accelerate_configs/"
            )
    for name, (neutral, remedy) in OVERRIDDEN_VARIABLES.items():
        said = os.environ.get(name, neutral).lower()
        if said != neutral:
            log.info(f"the launcher's {name}={said} is overridden: the recipe decides ({remedy})")
        os.environ[name] = neutral
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    accelerator = Accelerator(
        mixed_precision="no",  # autocast and scaler are the step's, one mechanism on all devices
        cpu=on_cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                timeout=timedelta(seconds=timeout_seconds + COLLECTIVE_GRACE_SECONDS)
            ),
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # statistics are micro-batch 0's, shared before an evaluation
                gradient_as_bucket_view=True,
            ),
        ],
    )
    if accelerator.num_processes != asked:
        raise UserError(
            f"the launcher started {asked} processes but each believes in {accelerator.num_processes}; "
            "use one of accelerate_configs/ or `torchrun --nproc_per_node N -m cifar_dist.train`"
        )
    torch.set_num_threads(threads or threads_per_process(accelerator.num_processes))
    return accelerator


def threads_per_process(world_size: int) -> int:
    """Slurm's share of CPUs for a task, or the machine's CPUs divided by its processes.

    Launchers set OMP_NUM_THREADS each in its own way, and other threads mean other last bits.
    """
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if share.isdigit():
        return max(1, int(share))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size(world_size))


def destroy_distributed(accelerator: Accelerator) -> None:
    """Leave the process group together; without this some runs exit non-zero."""
    if dist.is_initialized():
        accelerator.wait_for_everyone()
        dist.destroy_process_group()
