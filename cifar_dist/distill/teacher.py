"""Teachers: from an augmented batch to the logits that distillation losses compare with.

A teacher is frozen and sees the student's augmented images, at its own resolution. Each rank has a
replica, or the ranks shard it with FSDP2, or its logits are read from a cache. It is not part of the
run's state: a checkpoint only has its digest, and neither DDP nor the optimizer sees its parameters.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import Batch
from cifar_dist.distill.logit_cache import open_logits
from cifar_dist.models.classifier import Classifier, ModelConfig, build_model, num_parameters
from cifar_dist.utils.config import Positive, config
from cifar_dist.utils.errors import UserError

log = logging.getLogger(__name__)
ShardOver = Literal["world", "node"]


@config
class TeacherConfig:
    """The run to learn from, its weight among several, and how its logits are computed."""

    run: str  # a run folder, like runs/r50_224, or a .safetensors file of a whole model
    weight: Positive = 1.0  # weight of its logits in the mean over several teachers
    # replicated: a copy per process; sharded: split with FSDP; cached: logits from cache_logits
    placement: Literal["replicated", "sharded", "cached"] = "replicated"
    # processes over which a sharded teacher is split: all, or those of each machine
    shard_over: ShardOver = "world"
    cache: str | None = None  # folder of the cached logits; null: RUN/logits, or FILE.logits
    # the model of a file; null for a run folder, which has its own
    model: ModelConfig | None = None
    logit_scale: Positive | None = None  # scale of its loss; for a file with a cosine head only
    # run it in training mode, with batch statistics in BatchNorm and dropout, as in the tutorial
    train_mode: bool = False

    def __post_init__(self) -> None:
        if self.is_file and self.model is None:
            raise ValueError(f"{self.run} is a file: add a `model` section to build it from")
        if not self.is_file and (self.model or self.logit_scale):
            raise ValueError(
                "model and logit_scale are for a file, a run folder has its own; remove them"
            )
        if self.model and (self.model.head == "cosine") != (self.logit_scale is not None):
            raise ValueError(
                "a file with a cosine head needs logit_scale, one with a linear head has none"
            )
        if self.train_mode and self.placement == "cached":
            raise ValueError(
                "train_mode has no fixed logits to cache; remove it or placement: cached"
            )

    @property
    def is_file(self) -> bool:
        return self.run.endswith(".safetensors")

    @property
    def cache_folder(self) -> Path:
        if self.cache is not None:
            return Path(self.cache)
        return Path(f"{self.run}.logits") if self.is_file else Path(self.run) / "logits"


@dataclass(frozen=True, kw_only=True)
class TeacherWeights:
    """A trained model on disk."""

    model: ModelConfig
    weights: Path  # a safetensors file with the whole state dict
    digest: str  # its SHA-256
    logit_scale: float  # the factor of its own losses on cosines; 1 for a linear head
    data: str | None = None  # digest of the data it was trained on; None: unknown, as below
    classes: str | None = None  # digest of its class names in their order
    step: int | None = None
    top1: float | None = None  # of its finished training, in percent
    is_finished: bool | None = None


class Teacher(Protocol):
    local_num_params: int  # on this rank
    capturable: bool  # whether a CUDA graph can contain a call: it has no collective

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        """Return logits, f32 [B, C], without a gradient."""
        ...


class OnlineTeacher:
    """Runs a model on each augmented batch, under the caller's autocast."""

    def __init__(self, model: nn.Module, logit_scale: float, *, sharded: bool = False) -> None:
        self.model, self.logit_scale, self.capturable = model, logit_scale, not sharded
        self.local_num_params = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()
        )

    @torch.no_grad()
    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return self.model(view.images).logits * self.logit_scale


class CachedTeacher:
    """Looks up an online teacher's logits for each view of each row, float16 [V, N, C]."""

    local_num_params = 0
    capturable = True

    def __init__(self, logits: Tensor) -> None:
        self.rows = logits.shape[1]
        self.logits = logits.flatten(0, 1)

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return self.logits.index_select(0, view.view_ids * self.rows + batch.rows).float()


class TeacherEnsemble:
    """Averages the logits of several teachers with weights."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.teachers = teachers
        self.weights = [weight / sum(weights) for weight in weights]
        self.local_num_params = sum(teacher.local_num_params for teacher in teachers)
        self.capturable = all(teacher.capturable for teacher in teachers)

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        weighted = [
            weight * teacher(view, batch)
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        ]
        return torch.stack(weighted).sum(0)


def build_teacher(
    configs: Sequence[TeacherConfig],
    trained: Sequence[TeacherWeights],
    *,
    num_classes: int,
    device: torch.device,
    mesh: Callable[[ShardOver], DeviceMesh | None],
) -> Teacher | None:
    """Return the ensemble of the recipe's teachers, or None if it has none.

    `mesh` returns the device mesh to shard over, or None for a single process. A collective: all
    ranks must call this. Caches must have been checked. Raises UserError for weights that do not fit.
    """
    teachers: list[Teacher] = []
    for teacher, weights in zip(configs, trained, strict=True):
        if teacher.placement == "cached":
            logits = open_logits(teacher.cache_folder).to(device)
            views, rows, _ = logits.shape
            log.info(f"teacher {teacher.run}: cached logits for {views} views of {rows:,} rows")
            teachers.append(CachedTeacher(logits))
        else:
            over = mesh(teacher.shard_over) if teacher.placement == "sharded" else None
            teachers.append(build_online_teacher(teacher, weights, num_classes, device, over))
    return TeacherEnsemble(teachers, [config.weight for config in configs]) if teachers else None


def build_online_teacher(
    config: TeacherConfig,
    trained: TeacherWeights,
    num_classes: int,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> OnlineTeacher:
    """Return the trained model, sharded over `mesh` if it is given."""
    try:
        if mesh is None:
            model = build_model(trained.model, num_classes, load_file(trained.weights))
            eval_frozen(model).to(device)
        else:
            model = load_sharded(trained, num_classes, mesh)
    except UserError as error:
        raise UserError(f"the teacher {config.run}: {error}") from None
    except SafetensorError as error:
        raise UserError(
            f"the teacher {config.run} is not a safetensors file ({error}); check teacher.run"
        ) from None
    log.info(
        f"teacher {config.run}: {trained.model.backbone} at {trained.model.image_size} px, "
        f"{num_parameters(model):,} parameters"
    )
    model.train(config.train_mode)
    return OnlineTeacher(model, trained.logit_scale, sharded=mesh is not None)


def eval_frozen(model: Classifier) -> Classifier:
    """Freeze the model in eval mode. Keeps weights contiguous, which FSDP2 requires."""
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- sharded


def load_sharded(trained: TeacherWeights, num_classes: int, mesh: DeviceMesh) -> Classifier:
    """Return the model sharded over the mesh; each rank reads only its rows of each parameter.

    Parameters are built on the meta device. Buffers are built with their values and replicated, as
    some are in no file, like tables of relative positions.
    """
    unsupported = "its buffers cannot be rebuilt; use placement: replicated"
    with safe_open(trained.weights, "pt") as file:
        names = file.keys()
        shapes = {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names
        }
        try:
            with init_params_on_meta():
                model = eval_frozen(build_model(trained.model, num_classes, shapes))
        except NotImplementedError:  # a buffer is computed from a meta tensor
            raise UserError(unsupported) from None
        shard_frozen(model, mesh)
        state = model.state_dict()
        model.load_state_dict(
            {name: local_shard(file, name, state[name], mesh) for name in names}, assign=True
        )
    for module in model.modules():  # buffers created on the device of the parameters
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rebuild = getattr(module, "init_non_persistent_buffers", None)  # timm's method
            if rebuild is None:
                raise UserError(unsupported)
            rebuild()
    return model


@contextmanager
def init_params_on_meta() -> Iterator[None]:
    """Put the parameters of modules built inside the context on the meta device, but not buffers."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to each block, then to the rest of the model.

    A block is a member of a Sequential or ModuleList that has submodules of its own. Its parameters
    are gathered for its forward pass only; those of the root stay sharded between forward passes.
    """
    # FSDP2 can shard neither scalars nor parameters of several blocks, so every rank keeps them.
    named = model.named_parameters(remove_duplicate=False)
    uses = Counter(parameter for _, parameter in named)
    replicated = {p for p, count in uses.items() if p.ndim == 0 or count > 1}
    chains = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    for chain in reversed(chains):  # inner ones first
        for block in chain:
            is_chain = isinstance(block, nn.Sequential | nn.ModuleList)
            if not is_chain and any(block.children()) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)


def local_shard(file: Any, name: str, target: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's ceil(rows / ranks) rows of a tensor if `target` is sharded, else all."""
    device = torch.device(mesh.device_type)
    if not isinstance(target, DTensor):
        return file.get_tensor(name).to(device, target.dtype)
    dim = target.placements.index(Shard(0))  # of the mesh; a second one has replicas
    rows = -(-target.shape[0] // mesh.size(dim))
    start = min(rows * mesh.get_local_rank(dim), target.shape[0])
    local = file.get_slice(name)[start : start + rows]
    local = local.to(device, target.dtype, copy=True)  # a view would keep all rows in memory
    return DTensor.from_local(
        local, mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )
