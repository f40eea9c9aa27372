"""Collectives of Python values between the ranks of a run."""

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

# Rank 0 may download weights before the watchdog starts, and upload results after it.
AGREEMENT_TIMEOUT = timedelta(minutes=30)


def local_world_size(world_size: int) -> int:
    """Return the number of processes on this machine; all of them if the launcher does not set it."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(local)) if local.isdigit() else world_size


def rank_mesh(
    device: torch.device, world_size: int, *, over: Literal["world", "node"]
) -> DeviceMesh | None:
    """Return the mesh to shard a model over, or None for a single process. Collective.

    `node` gives a mesh with two dimensions: replicate across machines, shard within each.
    """
    if world_size == 1:
        return None
    if over == "world":
        return init_device_mesh(device.type, (world_size,))
    local = local_world_size(world_size)
    if world_size % local:
        raise UserError(
            f"shard_over: node needs the same number of processes on each machine, but {world_size} "
            f"in total is not a multiple of the {local} here; use shard_over: world"
        )
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (world_size // local, local), mesh_dim_names=names)


class Heartbeat:
    """Counter of a rank's progress in work that does not advance its step, such as an evaluation."""

    def __init__(self) -> None:
        self.count = 0

    def beat(self) -> None:
        self.count += 1


@dataclass(frozen=True)
class DistContext:
    """Rank, world size, and collectives over a separate gloo group, which never wait for a GPU."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @classmethod
    def of(cls, accelerator: Accelerator, *, timeout: timedelta = AGREEMENT_TIMEOUT) -> DistContext:
        """Create the group. A collective fails after `timeout`, or the accelerator's if longer."""
        if accelerator.init_handler and accelerator.init_handler.timeout:
            timeout = max(timeout, accelerator.init_handler.timeout)
        group = None
        if accelerator.num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(accelerator.process_index, accelerator.num_processes, group)  # type: ignore[arg-type]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Return the maximum of each value over the ranks."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_main(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call `function(*arguments, **options)` on rank 0, and return its result on all ranks.

        Its UserError or OSError is raised on all ranks.
        """
        if self.world_size == 1:
            return function(*arguments, **options)
        result: list[Any] = [None, None]  # value, error
        if self.is_main:
            try:
                result[0] = function(*arguments, **options)
            except (UserError, OSError) as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=self.group)
        value, raised = result
        if raised is not None:
            raise raised
        return value

    def run_on_all(self, function: Callable[[], T]) -> list[T]:
        """Call `function` on every rank, and return all results in rank order.

        The first UserError or OSError, by rank, is raised on all ranks.
        """
        if self.world_size == 1:
            return [function()]
        try:
            local: tuple[Any, Any] = (function(), None)
        except (UserError, OSError) as error:
            local = (None, error)
        gathered = self.all_gather_object(local)
        for _, raised in gathered:
            if raised is not None:
                raise raised
        return [value for value, _ in gathered]

    def require_equal(self, what: str, value: str) -> None:
        """Raise UserError on all ranks unless `value` (a digest, ...) is equal on all of them."""
        values = self.all_gather_object(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(
                    f"rank {rank} has another {what} than rank 0 ({other} instead of {values[0]}); "
                    "start all ranks from the same files"
                )
