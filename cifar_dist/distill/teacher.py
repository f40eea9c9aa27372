"""View -> the teacher's logits, which the taught losses call the guide.

A teacher is frozen and in evaluation mode and sees the student's own view at its own resolution.
Each rank holds it whole, or the ranks share it, or what it says about each view was written down
before. It is no part of the run's state: a checkpoint has its digest alone, and neither DDP nor an
optimizer ever sees it.
"""

from __future__ import annotations

import logging
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
from cifar_dist.models.backbones import Classifier, ModelConfig, build_model, num_parameters
from cifar_dist.utils.config import Positive, config
from cifar_dist.utils.errors import UserError

log = logging.getLogger(__name__)
ShardOver = Literal["world", "node"]


@config
class TeacherConfig:
    """Which run teaches, how much it counts among several, and where its weights or logits lie."""

    run: str  # a run folder, like runs/r50_224, or a .safetensors file of a whole model
    weight: Positive = 1.0
    placement: Literal["replicated", "sharded", "cached"] = "replicated"
    shard_over: ShardOver = "world"  # node: sharded within a machine, replicated across machines
    cache: str | None = None  # folder of the cached logits; None: RUN/logits, or FILE.logits
    model: ModelConfig | None = None  # of a file: how to build it
    logit_scale: Positive | None = None  # of a file with a cosine head: its loss's scale
    train_mode: bool = False  # BatchNorm by the batch, dropout on: as the tutorial has it

    def __post_init__(self) -> None:
        if self.is_file and self.model is None:
            raise ValueError(
                f"{self.run} is a file: add a `model` section that says how to build it"
            )
        if not self.is_file and (self.model or self.logit_scale):
            raise ValueError("model and logit_scale are for a file; a run folder has its own")
        if self.model and (self.model.head == "cosine") != (self.logit_scale is not None):
            raise ValueError(
                "a file with a cosine head needs logit_scale, with a linear one has none"
            )
        if self.train_mode and self.placement == "cached":
            raise ValueError(
                "train_mode has no fixed logits that could be cached; remove one of them"
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
    """A trained model on disk; who calls has looked it up."""

    model: ModelConfig
    weights: Path  # a safetensors file with the whole state dict
    digest: str  # its SHA-256
    logit_scale: float  # what its own losses multiply cosines with; 1 for a linear head


class Teacher(Protocol):
    local_num_params: int  # that this rank holds
    capturable: bool  # whether a CUDA graph can hold a call: it has no collective

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        """f32 [B, C], without a gradient."""
        ...


class OnlineTeacher:
    """A model that looks at each view anew, under the autocast that it is called in."""

    def __init__(self, model: nn.Module, logit_scale: float, *, sharded: bool = False) -> None:
        self.model, self.logit_scale, self.capturable = model, logit_scale, not sharded
        self.local_num_params = local_parameters(model)

    @torch.no_grad()
    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return self.model(view.images).logits * self.logit_scale


class CachedTeacher:
    """What a live teacher said about each view of each row, rounded to float16: [V, N, C]."""

    local_num_params = 0
    capturable = True

    def __init__(self, logits: Tensor) -> None:
        self.rows = logits.shape[1]
        self.logits = logits.flatten(0, 1)

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        return self.logits.index_select(0, view.view_ids * self.rows + batch.rows).float()


class TeacherEnsemble:
    """The weighted mean of several teachers' logits."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.teachers = teachers
        self.shares = [weight / sum(weights) for weight in weights]
        self.local_num_params = sum(teacher.local_num_params for teacher in teachers)
        self.capturable = all(teacher.capturable for teacher in teachers)

    def __call__(self, view: AugmentedBatch, batch: Batch) -> Tensor:
        guides = [
            share * teacher(view, batch)
            for teacher, share in zip(self.teachers, self.shares, strict=True)
        ]
        return torch.stack(guides).sum(0)


def build_teacher(
    configs: Sequence[TeacherConfig],
    trained: Sequence[TeacherWeights],
    *,
    num_classes: int,
    device: torch.device,
    mesh: Callable[[ShardOver], DeviceMesh | None],
) -> Teacher | None:
    """What the recipe's teachers say together; None where it has none.

    `mesh` gives the ranks to shard over, or None for a process that is alone. All ranks call this
    together; caches have been checked. UserError for weights that do not fit.
    """
    teachers: list[Teacher] = []
    for asked, found in zip(configs, trained, strict=True):
        match asked.placement:
            case "cached":
                logits = open_logits(asked.cache_folder).to(device)
                views, rows, _ = logits.shape
                log.info(f"teacher {asked.run}: its logits for {views} views of {rows:,} rows")
                teachers.append(CachedTeacher(logits))
            case "replicated":
                teachers.append(build_online_teacher(asked, found, num_classes, device, None))
            case "sharded":
                device_mesh = mesh(asked.shard_over)
                teachers.append(
                    build_online_teacher(asked, found, num_classes, device, device_mesh)
                )
    return TeacherEnsemble(teachers, [config.weight for config in configs]) if teachers else None


def build_online_teacher(
    asked: TeacherConfig,
    found: TeacherWeights,
    num_classes: int,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> OnlineTeacher:
    """The trained model on this rank, or its share of it where there is a mesh."""
    try:
        if mesh is None:
            model = build_model(found.model, num_classes, load_file(found.weights))
            eval_frozen(model).to(device)
        else:
            model = load_sharded(found, num_classes, mesh)
    except UserError as error:
        raise UserError(f"the teacher {asked.run}: {error}") from None
    except SafetensorError as error:
        raise UserError(f"the teacher {asked.run} is no safetensors file ({error})") from None
    log.info(
        f"teacher {asked.run}: {found.model.backbone} at {found.model.image_size} px, "
        f"{num_parameters(model):,} parameters"
    )
    return OnlineTeacher(model.train(asked.train_mode), found.logit_scale, sharded=mesh is not None)


def eval_frozen(model: Classifier) -> Classifier:
    """Evaluation mode for good; weights stay contiguous, as sharding needs it."""
    return model.eval().requires_grad_(False)


def local_parameters(model: nn.Module) -> int:
    """How many of the model's numbers this rank holds."""
    parameters = model.parameters()
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


# ----------------------------------------------------------------------------- sharded


def load_sharded(trained: TeacherWeights, num_classes: int, mesh: DeviceMesh) -> Classifier:
    """The model with each parameter's rows dealt over the mesh; each rank reads its rows alone.

    Parameters are built without numbers. Buffers are built with theirs and kept on every rank: there
    are some that no file has, like tables of relative positions.
    """
    with safe_open(trained.weights, "pt") as file:
        names = file.keys()
        shapes = {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names
        }
        try:
            with init_params_on_meta():
                model = eval_frozen(build_model(trained.model, num_classes, shapes))
        except NotImplementedError:  # buffers that are filled from what has no numbers yet
            raise UserError("its buffers cannot be rebuilt; use placement: replicated") from None
        shard_frozen(model, mesh)
        state = model.state_dict()
        model.load_state_dict(
            {name: local_shard(file, name, state[name], mesh) for name in names}, assign=True
        )
    for module in model.modules():  # buffers that were built where the parameters were
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rebuild = getattr(module, "init_non_persistent_buffers", None)  # timm's own name for it
            if rebuild is None:
                raise UserError("its buffers cannot be rebuilt; use placement: replicated")
            rebuild()
    return model


@contextmanager
def init_params_on_meta() -> Iterator[None]:
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


def local_shard(file: Any, name: str, place: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's ceil(rows / ranks) rows of a sharded tensor of the file, or all of another one."""
    device = torch.device(mesh.device_type)
    if not isinstance(place, DTensor):
        return file.get_tensor(name).to(device, place.dtype)
    dimension = place.placements.index(Shard(0))  # of the mesh; a second one has replicas
    rows = -(-place.shape[0] // mesh.size(dimension))
    start = min(rows * mesh.get_local_rank(dimension), place.shape[0])
    local = file.get_slice(name)[start : start + rows]
    local = local.to(device, place.dtype, copy=True)  # not a view of all
    return DTensor.from_local(
        local, mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )
