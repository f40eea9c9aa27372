"""The processes of a run: how they start, how they agree, how they end.

Accelerate gives launch, process group, device, DDP and no_sync. The recipe owns the mathematics, so
what a launcher's configuration says about precision, accumulation or compilation is overridden.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cifar_dist.utils.errors import UserError

T = TypeVar("T")


AGREEMENT_TIMEOUT = timedelta(minutes=30)


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


class Heartbeat:
    """Counts what shows that a rank does not hang while its step stays the same."""

    def __init__(self) -> None:
        self.count = 0

    def beat(self) -> None:
        self.count += 1


@dataclass(frozen=True)
class DistContext:
    """How ranks agree: over a group of their own on the CPU, so that no vote waits for a device."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @classmethod
    def of(cls, accelerator: Accelerator, *, timeout: timedelta = AGREEMENT_TIMEOUT) -> DistContext:
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

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Each value's maximum over the ranks; all ranks get the same numbers."""
        if self.world_size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.world_size == 1:
            return [value]
        seen: list[Any] = [None] * self.world_size
        dist.all_gather_object(seen, value, group=self.group)
        return seen

    def run_on_main(self, act: Callable[..., T], *arguments: Any, **options: Any) -> T:
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

    def run_on_all(self, act: Callable[[], T]) -> list[T]:
        """Every rank acts; all get all results in their order, or all raise the first UserError."""
        if self.world_size == 1:
            return [act()]
        try:
            mine: tuple[Any, Any] = (act(), None)
        except (UserError, OSError) as error:
            mine = (None, error)
        seen = self.all_gather_object(mine)
        errors = [error for _, error in seen if error is not None]
        if errors:
            raise errors[0]
        return [result for result, _ in seen]

    def require_equal(self, what: str, value: str) -> None:
        """Stop with one sentence where ranks see different things (code, recipe, data)."""
        seen = self.all_gather_object(value)
        other = next((rank for rank in range(self.world_size) if seen[rank] != seen[0]), None)
        if other is not None:
            raise UserError(
                f"rank {other} has another {what} than rank 0 ({seen[other]} against {seen[0]}); "
                "start all ranks from the same files"
            )
