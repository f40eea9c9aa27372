"""View -> the teacher's logits, which the taught losses call the guide.

A teacher is frozen and in evaluation mode, sees the student's own view at its own resolution, and is
held whole by each rank or sharded over them. It is no part of the run's state: a checkpoint has its
digest alone, and neither DDP nor an optimizer ever sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook

from cifar_dist.config import Positive, config
from cifar_dist.data.augment import View
from cifar_dist.data.batches import Batch
from cifar_dist.errors import UserError
from cifar_dist.nets.backbones import Classifier, ModelConfig, build_model, num_parameters

log = logging.getLogger(__name__)
Over = Literal["world", "node"]


@config
class TeacherConfig:
    """Which run teaches, how much it counts among several, and where its weights lie."""

    run: str  # a run folder, like runs/r50_224
    weight: Positive = 1.0
    placement: Literal["whole", "sharded"] = "whole"
    shard_over: Over = "world"  # node: sharded within a machine, replicated across machines


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model on disk; who calls has looked it up."""

    model: ModelConfig
    weights: Path  # a safetensors file with the whole state dict
    digest: str  # its SHA-256
    logit_scale: float  # what its own losses multiply cosines with; 1 for a linear head


class Teacher(Protocol):
    def __call__(self, view: View, batch: Batch) -> Tensor:
        """f32 [B, C], without a gradient."""
        ...


class Live:
    """A model that looks at each view anew, under the autocast that it is called in."""

    def __init__(self, model: nn.Module, logit_scale: float) -> None:
        self.model, self.logit_scale = model, logit_scale

    @torch.no_grad()
    def __call__(self, view: View, batch: Batch) -> Tensor:
        return self.model(view.images).logits * self.logit_scale


class Mean:
    """The weighted mean of several teachers' logits."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.teachers = teachers
        self.shares = [weight / sum(weights) for weight in weights]

    def __call__(self, view: View, batch: Batch) -> Tensor:
        guides = [
            share * teacher(view, batch)
            for teacher, share in zip(self.teachers, self.shares, strict=True)
        ]
        return torch.stack(guides).sum(0)


def build_teacher(
    configs: Sequence[TeacherConfig],
    trained: Sequence[Trained],
    *,
    num_classes: int,
    device: torch.device,
    mesh: Callable[[Over], DeviceMesh | None],
) -> Teacher | None:
    """What the recipe's teachers say together; None where it has none.

    `mesh` gives the ranks to shard over, or None for a process that is alone. All ranks call this
    together. UserError for weights that do not fit.
    """
    teachers = []
    for asked, found in zip(configs, trained, strict=True):
        ranks = mesh(asked.shard_over) if asked.placement == "sharded" else None
        try:
            if ranks is None:
                model = build_model(found.model, num_classes, load_file(found.weights))
                freeze(model).to(device)
            else:
                model = shard_by_shard(found, num_classes, ranks)
        except UserError as error:
            raise UserError(f"the teacher {asked.run}: {error}") from None
        log.info(
            f"teacher {asked.run}: {found.model.backbone} at {found.model.image_size} px, "
            f"{local_parameters(model):,} of {num_parameters(model):,} parameters on this rank"
        )
        teachers.append(Live(model, found.logit_scale))
    return Mean(teachers, [config.weight for config in configs]) if teachers else None


def freeze(model: Classifier) -> Classifier:
    """Evaluation mode for good; weights stay contiguous, as sharding needs it."""
    return model.eval().requires_grad_(False)


def local_parameters(model: nn.Module) -> int:
    """How many of the model's numbers this rank holds."""
    parameters = model.parameters()
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


# ----------------------------------------------------------------------------- sharded


def shard_by_shard(trained: Trained, num_classes: int, mesh: DeviceMesh) -> Classifier:
    """The model with each parameter's rows dealt over the mesh; each rank reads its rows alone.

    Parameters are built without numbers. Buffers are built with theirs and kept on every rank: there
    are some that no file has, like tables of relative positions.
    """
    with safe_open(trained.weights, "pt") as file:
        names = file.keys()
        shapes = {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names
        }
        with parameters_without_numbers():
            model = freeze(build_model(trained.model, num_classes, shapes))
        shard_frozen(model, mesh)
        state = model.state_dict()
        model.load_state_dict(
            {name: rows_of(file, name, state[name], mesh) for name in names}, assign=True
        )
    for module in model.modules():  # buffers that were built where the parameters were
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rebuild = getattr(module, "init_non_persistent_buffers", None)  # timm's own name for it
            if rebuild is None:
                raise UserError("its buffers cannot be rebuilt; use placement: whole")
            rebuild()
    return model


@contextmanager
def parameters_without_numbers() -> Iterator[None]:
    """Let modules that are built meanwhile have their parameters, not their buffers, on meta."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 by blocks: a block is a link of a chain that has parts of its own; then the root.

    A block's parameters are whole only while it computes, and so are those that only the root has.
    """
    # A scalar has no rows, and FSDP2 refuses it: every rank keeps it.
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    chains = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    for chain in reversed(chains):  # inner ones first
        for block in chain:
            is_chain = isinstance(block, nn.Sequential | nn.ModuleList)
            if not is_chain and any(block.children()) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def rows_of(file: Any, name: str, place: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's ceil(rows / ranks) rows of a sharded tensor of the file, or all of another one."""
    device = torch.device(mesh.device_type)
    if not isinstance(place, DTensor):
        return file.get_tensor(name).to(device)
    dimension = place.placements.index(Shard(0))  # of the mesh; a second one has replicas
    rows = -(-place.shape[0] // mesh.size(dimension))
    start = min(rows * mesh.get_local_rank(dimension), place.shape[0])
    local = file.get_slice(name)[start : start + rows].to(device, copy=True)  # not a view of all
    return DTensor.from_local(
        local, mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )
