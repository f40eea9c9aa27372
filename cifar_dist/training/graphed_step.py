"""The training step as CUDA graphs, captured once on a GPU and replayed: `run.cuda_graphs`.

At 32 px a step is hundreds of kernels of a few microseconds each, and launching them takes longer than
running them. Captured are the augmentation of the rank's images, each teacher's forward, each
micro-batch's forward and backward, and the update. Micro-batches of small images are replayed on
parallel streams, since one alone does not fill a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import Batch, concatenate
from cifar_dist.distributed.ddp import broadcast_weights, wrap_ddp
from cifar_dist.distributed.tree_sum import (
    GradientTree,
    TreeAllReduce,
    tree_depth,
    tree_order,
    tree_sum,
)
from cifar_dist.optim.optimizer import make_capturable
from cifar_dist.recipe.schema import CudaGraphs
from cifar_dist.training.cuda_graphs import WARM_UP, GraphedCallable, GraphRecorder, restore
from cifar_dist.training.objective import LossInputs, Objective, sum_terms
from cifar_dist.training.step import (
    StepConfig,
    StepResult,
    backward,
    bn_stats_enabled,
    micro_batches_of_rank,
    optimizer_step,
    seed_dropout,
    train_step,
)
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log
from cifar_dist.utils.precision import autocast

ALIGNMENT = 64  # elements; vectorized kernels need aligned gradients
MAX_STREAMS = 32  # torch has 32 streams per priority and assigns them round robin
PARALLEL_PIXELS = 64  # side of the largest images whose micro-batches are replayed in parallel


class StepFn(Protocol):
    """Take one step with the micro-batches of this rank."""

    def __call__(self, batches: list[Batch], /, *, step: int) -> StepResult: ...


class Gradients(NamedTuple):
    """Result of the forward and backward of one micro-batch."""

    sums: Tensor  # f32 [terms]: each term summed over the samples
    # of the parameters in use, in their order; empty where they are already added to the total
    tensors: list[Tensor]


class GraphedStep:
    """`train_step` as CUDA graphs: the same update, bit for bit where kernels are the same.

    Gradients are summed in the order of the tree into one flat tensor, and those of all ranks in one piece.
    Micro-batches of small images keep separate gradients until then, so that they can be replayed in
    parallel; others add them at once, to one flat tensor for each level of the tree.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: StepConfig,
        *,
        device: torch.device,
        world_size: int,
        new_recorder: type[GraphRecorder] | None,
        required: bool = False,
    ) -> None:
        assert config.sam is None
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.config, self.device, self.world_size = config, device, world_size
        self.loss_scale = 1 / config.batch_size
        self.new_recorder = new_recorder  # None: every part stays eager
        self.required = required  # a failed capture is an error
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        if world_size > 1:
            broadcast_weights(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.levels: list[tuple[Tensor, list[Tensor]]] = []  # flat gradients and their views
        self.add_level()
        self.all_reduce = TreeAllReduce(world_size, dtype=config.grad_reduce_dtype)
        self.in_use: list[int] = []  # indices of the parameters that the loss depends on
        if new_recorder:
            make_capturable(optimizer, device)
        # inputs of the graphs, at fixed addresses
        self.batch: Batch | None = None
        self.augmented: AugmentedBatch | None = None
        self.teacher_logits: Tensor | None = None
        self.captured_constants: object = None  # Python numbers that the graphs hold
        self.reset_graphs(0)

    def reset_graphs(self, micro_batches: int) -> None:
        """Drop all graphs and start over with eager steps and a new memory pool."""
        new = self.new_recorder
        main = new(self.device) if new else None
        augment, teacher = self.objective.augment, self.objective.teacher
        image_size = getattr(
            getattr(self.model, "preprocess", None), "image_size", PARALLEL_PIXELS + 1
        )
        self.parallel = 1 < micro_batches < MAX_STREAMS and image_size <= PARALLEL_PIXELS
        while not self.parallel and len(self.levels) < tree_depth(micro_batches):
            self.add_level()
        self.augment_graph: GraphedCallable[None] = GraphedCallable(
            main if augment.capturable else None
        )
        self.teacher_graphs: list[GraphedCallable[None]] = []
        self.learning_graphs: list[GraphedCallable[Gradients]] = []
        for _ in range(micro_batches):
            has_graph = teacher is not None and teacher.capturable
            self.teacher_graphs.append(GraphedCallable(main if has_graph else None))
            # Parallel graphs have separate streams, and with them separate cuBLAS workspaces.
            # Sequential graphs share one stream, which lets them share the memory of the pool.
            recorder = new(self.device, main.pool) if new and main and self.parallel else main
            self.learning_graphs.append(GraphedCallable(recorder, parallel=self.parallel))
        self.sum_graph: GraphedCallable[None] = GraphedCallable(main)
        self.update_graph: GraphedCallable[tuple[Tensor, Tensor]] = GraphedCallable(main)

    @property
    def flat(self) -> Tensor:
        """The summed gradients of all parameters."""
        return self.levels[0][0]

    def add_level(self) -> None:
        self.levels.append(flat_gradients(self.parameters))

    def __call__(self, batches: list[Batch], *, step: int) -> StepResult:
        self.invalidate_stale_graphs(batches[0].epoch, len(batches))
        self.objective.augment.prepare(batches[0].epoch)
        batch = self.copy_inputs(concatenate(batches))
        self.augment_graph(partial(self.augment, batch), written=self.augmented_tensors)
        gradients = self.learn(batches, step)
        parts: list[GraphedCallable[Any]] = []
        parts += [self.augment_graph, *self.teacher_graphs, *self.learning_graphs]
        if any(part.failed for part in parts) and not self.required:
            self.new_recorder = (
                None  # a captured update must not read tensors that eager code makes
            )
            self.reset_graphs(len(batches))
        if self.world_size > 1:
            if self.parallel:
                self.sum_graph(partial(self.sum_gradients, gradients), written=self.flat_tensor)
            self.all_reduce([self.flat])
        skipped, sums = self.update_graph(
            partial(self.update_weights, gradients), written=self.updated_tensors
        )
        parts += [self.sum_graph, self.update_graph]
        if self.required and any(part.failed for part in parts):
            raise UserError(
                "run.cuda_graphs=on: capturing the step failed (see above); set run.cuda_graphs=auto"
            )
        return StepResult(micro_batches_of_rank(batches, self.world_size), sums, skipped)

    def learn(self, batches: list[Batch], step: int) -> list[Gradients]:
        """Run teacher, forward and backward of each micro-batch."""
        starts = list(accumulate((len(batch.rows) for batch in batches), initial=0))
        gradients: dict[int, Gradients] = {}
        level = 0  # of the tree that the next gradients are stored in
        for index, additions in tree_order(len(batches)):
            batch, part = batches[index], slice(starts[index], starts[index + 1])
            seed = partial(
                seed_dropout,
                self.device,
                seed=self.config.seed,
                step=step,
                micro_batch=batch.micro_batch,
            )
            seed()  # for a teacher in train mode
            if self.objective.teacher:
                self.teacher_graphs[index](
                    partial(self.run_teacher, batch, part),
                    written=partial(self.teacher_tensors, part),
                )
            seed()
            gradients[index] = self.learning_graphs[index](
                partial(self.forward_backward, batch, part, level, additions),
                written=self.learned_tensors,
                compared=gradients_of,
            )
            level += 1 - additions
        for graph in self.learning_graphs:
            graph.join()
        return [gradients[index] for index in range(len(batches))]

    def invalidate_stale_graphs(self, epoch: int, micro_batches: int) -> None:
        """Capture again when an epoch has another image size or other loss weights."""
        constants = (getattr(self.model, "train_size", None), self.objective.weights(epoch))
        if constants != self.captured_constants:
            self.captured_constants = constants
            self.reset_graphs(micro_batches)

    def copy_inputs(self, batch: Batch) -> Batch:
        """Copy the row numbers to the addresses that the graphs read."""
        if self.batch is None:
            copies = None if batch.copies is None else batch.copies.clone()
            self.batch = replace(batch, rows=batch.rows.clone(), copies=copies)
        self.batch.rows.copy_(batch.rows)
        if self.batch.copies is not None and batch.copies is not None:
            self.batch.copies.copy_(batch.copies)
        return replace(self.batch, epoch=batch.epoch)

    def augment(self, batch: Batch) -> None:
        with autocast(self.config.precision, self.device):
            augmented = self.objective.augment(batch)
        if self.augmented is None:
            tensors = {name: value for name, value in vars(augmented).items() if value is not None}
            self.augmented = AugmentedBatch(**{name: t.clone() for name, t in tensors.items()})
        else:
            restore(self.augmented.tensors(), augmented.tensors())

    def run_teacher(self, batch: Batch, part: slice) -> None:
        assert self.batch
        assert self.augmented
        assert self.objective.teacher
        copies = None if self.batch.copies is None else self.batch.copies[part]
        batch = replace(batch, rows=self.batch.rows[part], copies=copies)
        with autocast(self.config.precision, self.device):
            logits = self.objective.teacher(self.augmented[part], batch)
        if self.teacher_logits is None:
            self.teacher_logits = logits.new_empty(len(self.batch.rows), logits.shape[1])
        self.teacher_logits[part].copy_(logits)

    def forward_backward(self, batch: Batch, part: slice, level: int, additions: int) -> Gradients:
        assert self.augmented
        for parameter in self.parameters:
            parameter.grad = None
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[part]
        inputs = LossInputs(self.augmented[part], teacher_logits, batch.epoch)
        is_first = batch.micro_batch == 0
        with (
            bn_stats_enabled(self.model, is_first),
            autocast(self.config.precision, self.device),
        ):
            terms = self.objective.compute_losses(self.model, inputs)
        backward(self.scaler, terms["loss"].sum() * self.loss_scale)
        used = {
            index: parameter.grad
            for index, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }
        self.in_use, gradients = list(used), list(used.values())
        if self.parallel:
            return Gradients(sum_terms(terms), gradients)
        self.store_gradients(gradients, level, additions)
        return Gradients(sum_terms(terms), [])

    @torch.no_grad()
    def store_gradients(self, gradients: list[Tensor], level: int, additions: int) -> None:
        """Copy the gradients of a micro-batch to a level of the tree, and add levels above it."""
        torch._foreach_copy_(self.views_in_use(level), gradients)
        for above in range(level - 1, level - 1 - additions, -1):
            torch._foreach_add_(self.views_in_use(above), self.views_in_use(above + 1))

    def views_in_use(self, level: int = 0) -> list[Tensor]:
        return [self.levels[level][1][index] for index in self.in_use]

    @torch.no_grad()
    def sum_gradients(self, gradients: list[Gradients]) -> None:
        total = tree_sum([one.tensors for one in gradients])
        torch._foreach_copy_(self.views_in_use(), total)

    def update_weights(self, gradients: list[Gradients]) -> tuple[Tensor, Tensor]:
        """Return whether the update was skipped, and the summed terms of each micro-batch."""
        if self.world_size == 1 and self.parallel:
            self.sum_gradients(gradients)
        for parameter in self.parameters:
            parameter.grad = None
        for index, view in zip(self.in_use, self.views_in_use(), strict=True):
            self.parameters[index].grad = view
        skipped = optimizer_step(
            self.model,
            self.optimizer,
            self.scaler,
            grad_scale=1,
            max_grad_norm=self.config.max_grad_norm,
        )
        return skipped, torch.stack([one.sums for one in gradients])

    # Tensors that each part writes: the capture restores them after comparing with the eager result.

    def augmented_tensors(self) -> list[Tensor]:
        return self.augmented.tensors() if self.augmented else []

    def teacher_tensors(self, part: slice) -> list[Tensor]:
        return [] if self.teacher_logits is None else [self.teacher_logits[part]]

    def learned_tensors(self) -> list[Tensor]:
        flats = [] if self.parallel else [flat for flat, _ in self.levels]
        return [*self.model.buffers(), *flats]

    def flat_tensor(self) -> list[Tensor]:
        return [self.flat]

    def updated_tensors(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [value for value in states if isinstance(value, Tensor)]
        return [self.flat, *self.parameters, *tensors]


def gradients_of(result: Gradients) -> list[Tensor]:
    """Return what a capture is compared by: rounding may change the top-1 of a sample."""
    return result.tensors


def build_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: StepConfig,
    *,
    cuda_graphs: CudaGraphs,
    micro_batches: int,
    restore_buffers: bool = False,
) -> StepFn:
    """Return a function that takes a step: CUDA graphs where possible, otherwise `train_step`.

    Build it again when other parameters become trainable. With `restore_buffers` a skipped step leaves
    running statistics unchanged. UserError if `cuda_graphs` is on and the step cannot be captured.
    """
    device = accelerator.device
    reason = unsupported_reason(model, optimizer, config, device)
    if reason and cuda_graphs == "on":
        raise UserError(f"run.cuda_graphs=on: {reason}; set run.cuda_graphs=auto")
    step_fn: StepFn
    if reason is None and cuda_graphs != "off":
        log.info(f"CUDA graphs: capturing the step after {WARM_UP} eager steps")
        step_fn = GraphedStep(
            model,
            objective,
            optimizer,
            config,
            device=device,
            world_size=accelerator.num_processes,
            new_recorder=GraphRecorder,
            required=cuda_graphs == "on",
        )
    else:
        if cuda_graphs != "off" and device.type == "cuda":
            log.info(f"CUDA graphs: off, {reason}")
        world_size, tree = accelerator.num_processes, None
        if config.reduction == "ddp":
            model = wrap_ddp(
                accelerator,
                model,
                micro_batches=micro_batches,
                grad_reduce_dtype=config.grad_reduce_dtype,
            )
        else:
            if world_size > 1:
                broadcast_weights(model)
            tree = GradientTree(
                [p for p in model.parameters() if p.requires_grad],
                world_size,
                dtype=config.grad_reduce_dtype,
            )
        step_fn = partial(
            train_step, accelerator, model, objective, optimizer, scaler, config, tree=tree
        )
    return partial(restore_buffers_on_skip, model, step_fn) if restore_buffers else step_fn


def restore_buffers_on_skip(
    model: nn.Module, step_fn: StepFn, batches: list[Batch], *, step: int
) -> StepResult:
    """Take a step, and restore the model's buffers if it was skipped, without reading from the device."""
    before = [buffer.clone() for buffer in model.buffers()]
    result = step_fn(batches, step=step)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(torch.where(result.skipped, value, buffer))
    return result


def flat_gradients(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Return one tensor of zeros for all gradients, and a view of it for each parameter.

    Each view has the strides of its parameter: torch's fused optimizers are silently wrong otherwise.
    """
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    parts = zip(parameters, flat.split(sizes), strict=True)
    return flat, [part.as_strided(p.shape, p.stride()) for p, part in parts]


def unsupported_reason(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: StepConfig,
    device: torch.device,
) -> str | None:
    """Return why the step cannot be captured, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and this is {device.type}"
    if config.reduction == "ddp":
        return "run.reduction=ddp reduces gradients inside the backward"
    if config.precision == "fp16":
        return "the loss scaler of fp16 reads a number from the device in each step"
    if config.sam:
        return "optim.sam changes the weights within a step"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} is not fused and reads a number in each step"
    if getattr(model, "mixed_resolution", None):
        return "model.mixed_resolution draws random numbers on the host"
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        return "model.grad_checkpointing saves the state of generators"
    return None
