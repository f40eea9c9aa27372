"""The training step as CUDA graphs, recorded once on a GPU and replayed: `run.cuda_graphs`.

At 32 px a step is hundreds of kernels of microseconds each, and launching them one by one takes
longer than running them. Recorded are the augmentation of the rank's rows, each teacher's forward,
each micro-batch's forward and backward, and the update. Micro-batches of small images are replayed
on parallel streams, as one alone does not fill a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import Batch, concatenate
from cifar_dist.distributed.ddp import (
    GradReduceDtype,
    all_reduce_gradients,
    broadcast_weights,
    wrap_ddp,
)
from cifar_dist.optim.optimizer import make_capturable
from cifar_dist.optim.sam import SamConfig
from cifar_dist.recipe.schema import CudaGraphs
from cifar_dist.training.cuda_graphs import WARM_UP, GraphedCallable, GraphRecorder, restore
from cifar_dist.training.objective import LossInputs, Objective, sum_terms
from cifar_dist.training.step import (
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
from cifar_dist.utils.precision import Precision, autocast

ALIGNMENT = 64  # numbers; gradients begin where vectorised kernels like it
MAX_STREAMS = 32  # torch has 32 streams per priority and hands them out round robin
PARALLEL_PIXELS = 64  # side of the largest images whose micro-batches are replayed in parallel


class StepFn(Protocol):
    """One update with a rank's micro-batches of a global batch."""

    def __call__(self, batches: list[Batch], /, *, step: int) -> StepResult: ...


class Gradients(NamedTuple):
    """What a micro-batch's forward and backward leave."""

    sums: Tensor  # f32 [terms]: each term's sum over the samples
    tensors: list[
        Tensor
    ]  # of the parameters that have one, in their order; empty if added up already


class GraphedStep:
    """`train_step` for what can be recorded: the same update, bit for bit where kernels are the same.

    Gradients are added up in the order of the micro-batches in one flat tensor, which ranks all-reduce
    at once; DDP has no part in it. Micro-batches of small images keep gradients of their own until
    then, so that they can be replayed in parallel.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        world_size: int,
        precision: Precision,
        seed: int,
        batch_size: int,
        max_grad_norm: float | None,
        grad_reduce_dtype: GradReduceDtype,
        new_recorder: type[GraphRecorder] | None,
        required: bool = False,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.device, self.world_size = device, world_size
        self.precision, self.seed = precision, seed
        self.scale, self.max_grad_norm = world_size / batch_size, max_grad_norm
        self.grad_reduce_dtype, self.new_recorder = grad_reduce_dtype, new_recorder
        self.required = required  # a recording that fails is an error
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        if world_size > 1:
            broadcast_weights(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flat, self.flat_views = flat_gradients(self.parameters)
        self.in_use: list[int] = []  # the parameters that the loss depends on, by their number
        if new_recorder:
            make_capturable(optimizer, device)
        # The inputs of the recordings, at fixed addresses.
        self.rows: Batch | None = None
        self.augmented: AugmentedBatch | None = None
        self.teacher_logits: Tensor | None = None
        self.captured_constants: object = None  # plain numbers that a recording holds
        self.reset_graphs(0)

    def reset_graphs(self, micro_batches: int) -> None:
        """Start over with eager steps, and with a new memory pool: the old one is cut to other sizes."""
        new = self.new_recorder
        main = new(self.device) if new else None
        augment, teacher = self.objective.augment, self.objective.teacher
        image_size = getattr(getattr(self.model, "pixels", None), "image_size", PARALLEL_PIXELS + 1)
        self.parallel = 1 < micro_batches < MAX_STREAMS and image_size <= PARALLEL_PIXELS
        self.augment_graph: GraphedCallable[None] = GraphedCallable(
            main if augment.capturable else None
        )
        self.teacher_graphs: list[GraphedCallable[None]] = []
        self.learning_graphs: list[GraphedCallable[Gradients]] = []
        for _ in range(micro_batches):
            can_teach = teacher is not None and teacher.capturable
            self.teacher_graphs.append(GraphedCallable(main if can_teach else None))
            # In parallel each has a stream of its own, and with it a workspace of cuBLAS. One after
            # the other they share the stream, without which they could not share the pool's memory.
            own = new(self.device, main.pool) if new and main and self.parallel else main
            self.learning_graphs.append(GraphedCallable(own, parallel=self.parallel))
        self.sum_graph: GraphedCallable[None] = GraphedCallable(main)
        self.update_graph: GraphedCallable[tuple[Tensor, Tensor]] = GraphedCallable(main)

    def __call__(self, batches: list[Batch], *, step: int) -> StepResult:
        self.invalidate_stale_graphs(batches[0].epoch, len(batches))
        self.objective.augment.prepare(batches[0].epoch)
        rows = self.copy_inputs(concatenate(batches))
        self.augment_graph(partial(self.augment, rows), written=self.view_tensors)
        learned = []
        start = 0
        for place, batch in enumerate(batches):
            part = slice(start, start := start + len(batch.rows))
            seed_dropout(self.device, seed=self.seed, step=step, micro_batch=batch.micro_batch)
            if self.objective.teacher:
                ask = partial(self.run_teacher, batch, part)
                self.teacher_graphs[place](ask, written=partial(self.teacher_tensors, part))
            seed_dropout(self.device, seed=self.seed, step=step, micro_batch=batch.micro_batch)
            learned.append(
                self.learning_graphs[place](
                    partial(self.forward_backward, batch, part),
                    written=self.learned_tensors,
                    compared=gradients_of,
                )
            )
        for learning in self.learning_graphs:
            learning.join()
        inputs: list[GraphedCallable[Any]] = [
            self.augment_graph,
            *self.teacher_graphs,
            *self.learning_graphs,
        ]
        if any(recording.failed for recording in inputs) and not self.required:
            self.new_recorder = (
                None  # the update must not read what is computed elsewhere each time
            )
            self.reset_graphs(len(batches))
        if self.world_size > 1 and self.parallel:
            self.sum_graph(partial(self.sum_gradients, learned), written=self.flat_tensor)
        if self.world_size > 1:
            all_reduce_gradients(self.flat, self.world_size, dtype=self.grad_reduce_dtype)
        skipped, sums = self.update_graph(
            partial(self.update_weights, learned), written=self.updated_tensors
        )
        if self.required and any(
            one.failed for one in (*inputs, self.sum_graph, self.update_graph)
        ):
            raise UserError("run.cuda_graphs=on: recording the step failed (see above); write auto")
        return StepResult(micro_batches_of_rank(batches, self.world_size), sums, skipped)

    def invalidate_stale_graphs(self, epoch: int, micro_batches: int) -> None:
        """Record again where an epoch has another image size or other weights of the losses."""
        constants = (getattr(self.model, "train_size", None), self.objective.weights(epoch))
        if constants != self.captured_constants:
            self.captured_constants = constants
            self.reset_graphs(micro_batches)

    def copy_inputs(self, batch: Batch) -> Batch:
        """Copy the rows to where the recordings read them."""
        if self.rows is None:
            copies = None if batch.copies is None else batch.copies.clone()
            self.rows = replace(batch, rows=batch.rows.clone(), copies=copies)
        self.rows.rows.copy_(batch.rows)
        if self.rows.copies is not None and batch.copies is not None:
            self.rows.copies.copy_(batch.copies)
        return replace(self.rows, epoch=batch.epoch)

    def augment(self, rows: Batch) -> None:
        with autocast(self.precision, self.device):
            view = self.objective.augment(rows)
        if self.augmented is None:
            columns = {name: tensor for name, tensor in vars(view).items() if tensor is not None}
            self.augmented = AugmentedBatch(
                **{name: tensor.clone() for name, tensor in columns.items()}
            )
        else:
            restore(self.augmented.tensors(), view.tensors())

    def run_teacher(self, batch: Batch, part: slice) -> None:
        """Run the teacher on a micro-batch."""
        assert self.rows
        assert self.augmented
        assert self.objective.teacher
        copies = None if self.rows.copies is None else self.rows.copies[part]
        batch = replace(batch, rows=self.rows.rows[part], copies=copies)
        with autocast(self.precision, self.device):
            logits = self.objective.teacher(self.augmented[part], batch)
        if self.teacher_logits is None:
            self.teacher_logits = logits.new_empty(len(self.rows.rows), logits.shape[1])
        self.teacher_logits[part].copy_(logits)

    def forward_backward(self, batch: Batch, part: slice) -> Gradients:
        assert self.augmented
        for parameter in self.parameters:
            parameter.grad = None
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[part]
        inputs = LossInputs(self.augmented[part], teacher_logits, batch.epoch)
        with (
            bn_stats_enabled(self.model, batch.micro_batch == 0),
            autocast(self.precision, self.device),
        ):
            terms = self.objective.compute_losses(self.model, inputs)
        backward(self.scaler, terms["loss"].sum() * self.scale)
        found = {
            number: parameter.grad
            for number, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }
        self.in_use = list(found)
        gradients = list(found.values())
        if self.parallel:
            return Gradients(sum_terms(terms), gradients)
        self.add_gradients(gradients, is_first=part.start == 0)
        return Gradients(sum_terms(terms), [])

    @torch.no_grad()
    def add_gradients(self, gradients: list[Tensor], *, is_first: bool) -> None:
        """Add a micro-batch's gradients to the sum, or begin the sum with them."""
        total = [self.flat_views[number] for number in self.in_use]
        if is_first:
            torch._foreach_copy_(total, gradients)
        else:
            torch._foreach_add_(total, gradients)

    def sum_gradients(self, learned: list[Gradients]) -> None:
        """Add up the gradients that the micro-batches kept, in their order."""
        for place, one in enumerate(learned):
            self.add_gradients(one.tensors, is_first=place == 0)

    def update_weights(self, learned: list[Gradients]) -> tuple[Tensor, Tensor]:
        """Return whether the update was skipped, and the sums of the terms of each micro-batch."""
        if self.world_size == 1 and self.parallel:
            self.sum_gradients(learned)
        for parameter in self.parameters:
            parameter.grad = None
        for number in self.in_use:
            self.parameters[number].grad = self.flat_views[number]
        skipped = optimizer_step(
            self.model, self.optimizer, self.scaler, grad_scale=1, max_grad_norm=self.max_grad_norm
        )
        return skipped, torch.stack([one.sums for one in learned])

    def view_tensors(self) -> list[Tensor]:
        return self.augmented.tensors() if self.augmented else []

    def teacher_tensors(self, part: slice) -> list[Tensor]:
        return [] if self.teacher_logits is None else [self.teacher_logits[part]]

    def learned_tensors(self) -> list[Tensor]:
        return [*self.model.buffers(), *([] if self.parallel else [self.flat])]

    def flat_tensor(self) -> list[Tensor]:
        return [self.flat]

    def updated_tensors(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [value for value in states if isinstance(value, Tensor)]
        return [self.flat, *self.parameters, *tensors]


def gradients_of(learned: Gradients) -> list[Tensor]:
    """Return what a recording is compared by; rounding may turn over a sample's top-1."""
    return learned.tensors


def build_step(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    cuda_graphs: CudaGraphs,
    micro_batches: int,
    precision: Precision,
    seed: int,
    batch_size: int,
    max_grad_norm: float | None,
    sam: SamConfig | None,
    grad_reduce_dtype: GradReduceDtype,
    restore_buffers: bool = False,
) -> StepFn:
    """Return how to take a step: recorded on a GPU where that is possible, else `train_step` under DDP.

    Build it again when other parameters learn. With `keep_buffers` a step that is skipped because a
    number was not finite leaves no trace in running statistics. UserError where `cuda_graphs` is on
    and the step cannot be recorded.
    """
    keeping = (
        partial(restore_buffers_on_skip, model) if restore_buffers else lambda take_step: take_step
    )
    device = accelerator.device
    reason = unsupported_reason(model, optimizer, device=device, precision=precision, sam=sam)
    if reason and cuda_graphs == "on":
        raise UserError(f"run.cuda_graphs=on: the step cannot be recorded: {reason}; write auto")
    if reason is None and cuda_graphs != "off":
        log.info(f"run.cuda_graphs: after {WARM_UP} steps the step is recorded, then replayed")
        graphed = GraphedStep(
            model,
            objective,
            optimizer,
            device=device,
            world_size=accelerator.num_processes,
            precision=precision,
            seed=seed,
            batch_size=batch_size,
            max_grad_norm=max_grad_norm,
            grad_reduce_dtype=grad_reduce_dtype,
            new_recorder=GraphRecorder,
            required=cuda_graphs == "on",
        )
        return keeping(graphed)
    if cuda_graphs != "off" and device.type == "cuda":
        log.info(f"run.cuda_graphs: the step is not recorded: {reason}")
    eager = partial(
        train_step,
        accelerator,
        wrap_ddp(
            accelerator, model, micro_batches=micro_batches, grad_reduce_dtype=grad_reduce_dtype
        ),
        objective,
        optimizer,
        scaler,
        precision=precision,
        seed=seed,
        batch_size=batch_size,
        max_grad_norm=max_grad_norm,
        sam=sam,
    )
    return keeping(eager)


def restore_buffers_on_skip(model: nn.Module, take_step: StepFn) -> StepFn:
    """Puts the model's buffers back where a step was left out, on the device; no number is read."""

    def take(batches: list[Batch], /, *, step: int) -> StepResult:
        before = [buffer.clone() for buffer in model.buffers()]
        made = take_step(batches, step=step)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(torch.where(made.skipped, value, buffer))
        return made

    return take


def flat_gradients(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Return one tensor of zeros for all gradients, and a view of it for each parameter.

    Each view has its parameter's strides: torch's fused optimizers silently err where they differ.
    """
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    parts = zip(parameters, flat.split(sizes), strict=True)
    return flat, [part.as_strided(p.shape, p.stride()) for p, part in parts]


def unsupported_reason(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    precision: Precision,
    sam: SamConfig | None,
) -> str | None:
    """Return why a step cannot be recorded, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, and this is {device.type}"
    if precision == "fp16":
        return "the scaler of fp16 reads a number in each step"
    if sam:
        return "optim.sam changes the weights within a step"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} has no fused form, so a number is read in each step"
    if getattr(model, "mixed_resolution", None):
        return "model.mixed_resolution draws on the host"
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        return "model.grad_checkpointing keeps the state of generators"
    return None
