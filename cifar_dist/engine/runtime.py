"""The processes of a run: how they start, how they agree, how they end.

Accelerate gives launch, process group, device, DDP and no_sync. The recipe owns the mathematics, so
what a launcher's configuration says about precision, accumulation or compilation is overridden.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from cifar_dist.engine import slurm
from cifar_dist.errors import UserError, is_main_rank

T = TypeVar("T")

ReducePrecision = Literal["fp32", "bf16"]  # in which ranks send each other gradients

log = logging.getLogger("cifar_dist")

AGREEMENT_TIMEOUT = timedelta(minutes=30)
LATER_SECONDS = 10  # collectives give up later than the watchdog, which knows rank and step

# What launchers put into the environment and the recipe decides: variable -> (neutral, remedy).
OVERRIDDEN = {
    "ACCELERATE_MIXED_PRECISION": ("no", "run.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "run.shards"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "run.compile"),
}
REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def log_to_terminal() -> None:
    """Rank 0 tells what happens, line by line around its progress bar; other ranks only warn."""

    class AroundTheBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                tqdm.write(self.format(record), file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # who read it, like `head`, has seen enough; the work goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if not log.handlers:
        log.addHandler(AroundTheBar())
    log.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    log.propagate = False


def adopt_slurm_ranks() -> None:
    """Under plain srun, tell torch what Slurm knows."""
    os.environ.update(slurm.torch_variables(os.environ, visible_devices=torch.cuda.device_count()))


def local_world_size(world_size: int) -> int:
    """How many of the processes run on this machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(here)) if here.isdigit() else world_size


def rank_mesh(
    device: torch.device, world_size: int, *, over: Literal["world", "node"]
) -> DeviceMesh | None:
    """The ranks to shard a model over, None for a process that is alone; all ranks call it together.

    `node`: two dimensions, replicas across machines and shards within one.
    """
    if world_size == 1:
        return None
    if over == "world":
        return init_device_mesh(device.type, (world_size,))
    local = local_world_size(world_size)
    if world_size % local:
        raise UserError(
            f"shard_over: node needs as many processes on each machine, but {world_size} in all are "
            f"not a multiple of {local} here; use shard_over: world"
        )
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (world_size // local, local), mesh_dim_names=names)


def start_processes(
    *, timeout_seconds: int, threads: int | None, deterministic: bool = False
) -> Accelerator:
    """Join the process group that the launcher prepared (or be alone) and check that it is whole.

    Raises UserError when this process believes in another number of processes than its launcher.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes stay, so the fastest pays
    for name, what in REFUSED.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher's configuration asks for {what}, but recipes train with DDP; "
                "use one of accelerate_configs/"
            )
    for name, (neutral, remedy) in OVERRIDDEN.items():
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
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds + LATER_SECONDS)),
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # statistics are shard 0's, shared before an evaluation
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


def end_processes(accelerator: Accelerator) -> None:
    """Leave the process group together; without this some runs exit non-zero."""
    if dist.is_initialized():
        accelerator.wait_for_everyone()
        dist.destroy_process_group()


def wrap(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    shards: int,
    reduce_precision: ReducePrecision = "fp32",
) -> nn.Module:
    """The model under DDP, or itself where there is one process; call it anew when other parameters learn.

    Accelerate lets go of an earlier one here, and with it of its hooks and its buckets of gradients.
    The graph is static only where each rank runs one shard: together with `no_sync` a static graph
    crashes on the first backward or stops reducing.
    """
    accelerator.free_memory()
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.static_graph = shards == accelerator.num_processes
    with warnings.catch_warnings():  # torch renames broadcast_buffers; Accelerate has the old name
        warnings.filterwarnings("ignore", category=FutureWarning)
        wrapped = accelerator.prepare_model(model)
    if reduce_precision == "bf16" and accelerator.num_processes > 1:
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped


def reduce_gradients(flat: Tensor, world_size: int, *, precision: ReducePrecision) -> None:
    """Make f32 gradients, in place, their mean over all ranks, as DDP does: divided, then added up."""
    sent = flat.bfloat16() if precision == "bf16" else flat
    dist.all_reduce(sent.div_(world_size))
    if sent is not flat:
        flat.copy_(sent)


class Pulse:
    """Counts what shows that a rank does not hang while its step stays the same."""

    def __init__(self) -> None:
        self.beats = 0

    def beat(self) -> None:
        self.beats += 1


@dataclass(frozen=True)
class Ranks:
    """How ranks agree: over a group of their own on the CPU, so that no vote waits for a device."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    pulse: Pulse = field(default_factory=Pulse)

    @classmethod
    def of(cls, accelerator: Accelerator, *, timeout: timedelta = AGREEMENT_TIMEOUT) -> Ranks:
        """The ranks of a launch. `timeout`: how long one may keep the others waiting.

        Before and after the watchdog's time rank 0 may download weights and upload results.
        """
        alone = accelerator.num_processes == 1
        if accelerator.init_handler and accelerator.init_handler.timeout:
            timeout = max(timeout, accelerator.init_handler.timeout)
        group = None if alone else dist.new_group(backend="gloo", timeout=timeout)
        return cls(accelerator.process_index, accelerator.num_processes, group)  # type: ignore[arg-type]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def largest(self, values: list[float]) -> list[float]:
        """Each value's maximum over the ranks; all ranks get the same numbers."""
        if self.world_size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def each(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.world_size == 1:
            return [value]
        seen: list[Any] = [None] * self.world_size
        dist.all_gather_object(seen, value, group=self.group)
        return seen

    def main_does(self, act: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call `act(*arguments, **options)` on rank 0; all ranks get its result or raise its UserError."""
        if self.world_size == 1:
            return act(*arguments, **options)
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = act(*arguments, **options)
            except (UserError, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def together(self, act: Callable[[], T]) -> list[T]:
        """Every rank acts; all get all results in their order, or all raise the first UserError."""
        if self.world_size == 1:
            return [act()]
        try:
            mine: tuple[Any, Any] = (act(), None)
        except (UserError, OSError) as error:
            mine = (None, error)
        seen = self.each(mine)
        errors = [error for _, error in seen if error is not None]
        if errors:
            raise errors[0]
        return [result for result, _ in seen]

    def same(self, what: str, value: str) -> None:
        """Stop with one sentence where ranks see different things (code, recipe, data)."""
        seen = self.each(value)
        other = next((rank for rank in range(self.world_size) if seen[rank] != seen[0]), None)
        if other is not None:
            raise UserError(
                f"rank {other} has another {what} than rank 0 ({seen[other]} against {seen[0]}); "
                "start all ranks from the same files"
            )


def progress_bar(done: int, total: int, *, shown: bool, unit: str = "step") -> tqdm:
    """A bar on rank 0 of a terminal, nothing elsewhere."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        disable=None if shown else True,  # None: only on a terminal
    )


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks rank 0's buffers (BatchNorm's running statistics are shard 0's)."""
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def share_weights(model: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers, as DDP does when it is made; all call it together."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)


def gather_blocks(local: Tensor, ranks: Ranks) -> Tensor:
    """[blocks, ...] of each rank, dealt block by block, back in one row: [blocks * W, ...]."""
    if ranks.world_size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(ranks.world_size)]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)
