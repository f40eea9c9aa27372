"""The training step, recorded once as CUDA graphs on a GPU and replayed: `run.graph`.

At 32 px a step is hundreds of kernels of microseconds each, and launching them one by one takes
longer than running them. Recorded are the augmentation of the rank's rows, each teacher's forward,
each micro-batch's forward and backward, and the update. Micro-batches of small images are replayed
on parallel streams, as one alone does not fill a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment import View
from cifar_dist.data.batches import Batch, concatenate
from cifar_dist.engine.runtime import ReducePrecision, log, reduce_gradients, share_weights, wrap
from cifar_dist.engine.step import (
    Precision,
    StepResult,
    autocast,
    backward,
    generator_of,
    leading,
    seed_draws,
    shards_of_rank,
    train_step,
    update,
)
from cifar_dist.errors import UserError
from cifar_dist.learn.objective import LossInputs, Objective, sum_terms
from cifar_dist.learn.optim import keep_scalars_on_device
from cifar_dist.learn.sam import SamConfig

T = TypeVar("T")

WARM_UP = 3  # eager steps before recording: momenta are allocated, libraries choose algorithms
ALIGNMENT = 64  # numbers; gradients begin where vectorised kernels like it
REPLAY_TOLERANCE = 0.1  # relative; cuDNN may choose kernels whose sums are not reproducible
PARALLEL_PIXELS = 64  # side of the largest images whose micro-batches are replayed in parallel


class StepFn(Protocol):
    """One update with a rank's shards of a global batch."""

    def __call__(self, batches: list[Batch], /, *, step: int) -> StepResult: ...


class GraphRecorder:
    """Records device work on a stream of its own into CUDA graphs.

    Graphs that are replayed one after the other share the memory `pool`.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = pool or torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run what is inside on the recorder's stream, after what was before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let what follows wait for the recorder's stream."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], T], *, own_pool: bool) -> tuple[Callable[[], None], T]:
        """Return how to replay `work` and where its results will be; nothing is computed yet.

        A RuntimeError leaves the device as it was before; a capture that cannot be ended does not,
        so it is a UserError.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(
                graph,
                pool=torch.cuda.graph_pool_handle() if own_pool else self.pool,
                stream=self.stream,
                capture_error_mode="thread_local",  # other threads write checkpoints, send heartbeats
            ):
                results = work()
        except RuntimeError as error:
            # torch leaves the stream only after it has ended the capture. If that failed, the stream,
            # the generator and the memory pool are still in capture mode and cannot be used again.
            if torch.cuda.current_stream() == self.stream:
                cause = first_line(error.__context__ or error)
                raise UserError(
                    f"run.graph: recording the step failed ({cause}); start again with run.graph=off"
                ) from error
            raise
        return graph.replay, results


class GraphedCallable(Generic[T]):
    """Device work on tensors with fixed addresses: eager for WARM_UP calls, then recorded and replayed.

    Without a recorder, and where a recording fails cleanly, it stays eager. With `parallel` it is
    replayed on the recorder's stream, and `join` waits for it. It holds no reference to the work, so a
    step and its recordings are freed with the last reference to the step.
    """

    def __init__(self, recorder: GraphRecorder | None, *, parallel: bool = False) -> None:
        self.recorder, self.parallel, self.calls = recorder, parallel, 0
        self.failed = False
        self.replay: Callable[[], None] | None = None
        self.results: Any = None  # of the recording

    def __call__(
        self,
        work: Callable[[], T],
        *,
        written: Callable[[], list[Tensor]] = list,
        compared: Callable[[T], object] = lambda results: results,
    ) -> T:
        """Do `work`, always the same one, and return its results; a replay returns the same tensors.

        `written` lists the tensors that it changes in place. `compared` are those results which a
        replay computes as eager execution does, but for rounding.
        """
        self.calls += 1
        if self.recorder is None or self.failed:
            return work()
        if self.calls <= WARM_UP:
            with self.recorder.on_stream():
                results = work()
            self.recorder.join()
            return results
        if self.replay is None:
            return self.record(self.recorder, work, written(), compared)
        if self.parallel:
            with self.recorder.on_stream():
                self.replay()
        else:
            self.replay()
        return self.results

    def join(self) -> None:
        """Let what follows wait for a parallel replay."""
        if self.recorder and self.parallel:
            self.recorder.join()

    def record(
        self,
        recorder: GraphRecorder,
        work: Callable[[], T],
        written: list[Tensor],
        compared: Callable[[T], object],
    ) -> T:
        """Record the work, and compare a replay with eager execution from the same state.

        UserError where they differ by more than rounding, or at all under run.deterministic. Work that
        draws random numbers is not replayed in parallel: all graphs read one seed on the device.
        """
        exact = torch.are_deterministic_algorithms_enabled()

        def of(results: T) -> list[Tensor]:
            leaves = tree_leaves(results if exact else compared(results))
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        generator = generator_of(recorder.device)
        before, random_state = clones(written), generator.get_state()
        with recorder.on_stream():
            results = work()
        recorder.join()
        expected, after = clones(of(results)), clones(written)
        random_state_after = generator.get_state()
        self.parallel &= torch.equal(random_state, random_state_after)
        restore(written, before)
        generator.set_state(random_state)
        try:
            replay, recorded = recorder.record(work, own_pool=self.parallel)
        except RuntimeError as error:
            log.warning(f"run.graph: the step stays eager: recording failed ({first_line(error)})")
            self.failed = True
            restore(written, after)
            generator.set_state(random_state_after)
            return results
        replay()
        difference = max(
            relative_difference(of(recorded), expected), relative_difference(written, after)
        )
        log.debug(f"run.graph: replay and eager execution differ by {difference:.3g}")
        tolerance = 0.0 if exact else REPLAY_TOLERANCE
        if difference > tolerance:
            raise UserError(
                f"run.graph: the recorded step differs from the eager step by {difference:.2g} "
                f"(relative; at most {tolerance:g}); start again with run.graph=off"
            )
        self.replay, self.results = replay, recorded
        return recorded


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ||found - expected|| / ||expected|| over all tensors together; 0 for equal bits.

    Values that are not finite count as equal to each other: the guard of the step reports them.
    """
    difference = norm = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        difference += float((one - other).square().sum())
        norm += float(other.square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


class Gradients(NamedTuple):
    """What a micro-batch's forward and backward leave."""

    sums: Tensor  # f32 [terms]: each term's sum over the samples
    tensors: list[Tensor]  # of the parameters that have one, in their order


class GraphedStep:
    """`train_step` for what can be recorded: the same update, bit for bit where kernels are the same.

    Each micro-batch has gradients of its own. Their sum, in the order of the micro-batches, lies in
    one flat tensor, which ranks all-reduce at once; DDP has no part in it.
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
        reduce_precision: ReducePrecision,
        new_recorder: type[GraphRecorder] | None,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.device, self.world_size = device, world_size
        self.precision, self.seed = precision, seed
        self.scale, self.max_grad_norm = world_size / batch_size, max_grad_norm
        self.reduce_precision, self.new_recorder = reduce_precision, new_recorder
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        if world_size > 1:
            share_weights(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flat, self.flat_views = flat_gradients(self.parameters)
        self.in_use: list[int] = []  # the parameters that the loss depends on, by their number
        if new_recorder:
            keep_scalars_on_device(optimizer, device)
        # The inputs of the recordings, at fixed addresses.
        self.rows: Batch | None = None
        self.view: View | None = None
        self.teacher_logits: Tensor | None = None
        self.captured_constants: object = None  # plain numbers that a recording holds
        self.drop_recordings(0)

    def drop_recordings(self, micro_batches: int) -> None:
        """Start over with eager steps, and with a new memory pool: the old one is cut to other sizes."""
        new = self.new_recorder
        main = new(self.device) if new else None
        augment, teacher = self.objective.augment, self.objective.teacher
        image_size = getattr(getattr(self.model, "pixels", None), "image_size", PARALLEL_PIXELS + 1)
        parallel = micro_batches > 1 and image_size <= PARALLEL_PIXELS
        self.augmenting: GraphedCallable[None] = GraphedCallable(
            main if augment.recordable else None
        )
        self.teaching: list[GraphedCallable[None]] = []
        self.learning: list[GraphedCallable[Gradients]] = []
        for _ in range(micro_batches):
            can_teach = teacher is not None and teacher.recordable
            self.teaching.append(GraphedCallable(main if can_teach else None))
            # each on a stream of its own, as cuBLAS has a workspace for each
            own = new(self.device, main.pool) if new and main else None
            self.learning.append(GraphedCallable(own, parallel=parallel))
        self.summing: GraphedCallable[None] = GraphedCallable(main)
        self.updating: GraphedCallable[tuple[Tensor, Tensor]] = GraphedCallable(main)

    def __call__(self, batches: list[Batch], *, step: int) -> StepResult:
        self.drop_stale_recordings(batches[0].epoch, len(batches))
        self.objective.augment.prepare(batches[0].epoch)
        rows = self.at_fixed_address(concatenate(batches))
        self.augmenting(partial(self.augment, rows), written=self.view_tensors)
        learned = []
        start = 0
        for place, batch in enumerate(batches):
            part = slice(start, start := start + len(batch.rows))
            seed_draws(self.device, seed=self.seed, step=step, shard=batch.shard)
            if self.objective.teacher:
                ask = partial(self.ask_teacher, batch, part)
                self.teaching[place](ask, written=partial(self.teacher_tensors, part))
            seed_draws(self.device, seed=self.seed, step=step, shard=batch.shard)
            learned.append(
                self.learning[place](
                    partial(self.forward_backward, batch, part),
                    written=partial(list, self.model.buffers()),
                    compared=gradients_of,
                )
            )
        for learning in self.learning:
            learning.join()
        recordings: list[GraphedCallable[Any]] = [self.augmenting, *self.teaching, *self.learning]
        if any(recording.failed for recording in recordings):
            self.new_recorder = None
            self.drop_recordings(len(batches))
        if self.world_size > 1:
            self.summing(partial(self.sum_gradients, learned), written=self.flat_tensor)
            reduce_gradients(self.flat, self.world_size, precision=self.reduce_precision)
        skipped, sums = self.updating(
            partial(self.update_weights, learned), written=self.updated_tensors
        )
        return StepResult(shards_of_rank(batches, self.world_size), sums, skipped)

    def drop_stale_recordings(self, epoch: int, micro_batches: int) -> None:
        """Record again where an epoch has another image size or other weights of the losses."""
        constants = (getattr(self.model, "train_size", None), self.objective.weights(epoch))
        if constants != self.captured_constants:
            self.captured_constants = constants
            self.drop_recordings(micro_batches)

    def at_fixed_address(self, batch: Batch) -> Batch:
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
        if self.view is None:
            columns = {name: tensor for name, tensor in vars(view).items() if tensor is not None}
            self.view = View(**{name: tensor.clone() for name, tensor in columns.items()})
        else:
            restore(self.view.tensors(), view.tensors())

    def ask_teacher(self, batch: Batch, part: slice) -> None:
        """Run the teacher on a micro-batch."""
        assert self.rows
        assert self.view
        assert self.objective.teacher
        copies = None if self.rows.copies is None else self.rows.copies[part]
        batch = replace(batch, rows=self.rows.rows[part], copies=copies)
        with autocast(self.precision, self.device):
            logits = self.objective.teacher(self.view[part], batch)
        if self.teacher_logits is None:
            self.teacher_logits = logits.new_empty(len(self.rows.rows), logits.shape[1])
        self.teacher_logits[part].copy_(logits)

    def forward_backward(self, batch: Batch, part: slice) -> Gradients:
        assert self.view
        for parameter in self.parameters:
            parameter.grad = None
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[part]
        inputs = LossInputs(self.view[part], teacher_logits, batch.epoch)
        with leading(self.model, batch.shard == 0), autocast(self.precision, self.device):
            terms = self.objective.compute_losses(self.model, inputs)
        backward(self.scaler, terms["loss"].sum() * self.scale)
        found = {
            number: parameter.grad
            for number, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }
        self.in_use = list(found)
        return Gradients(sum_terms(terms), list(found.values()))

    @torch.no_grad()
    def sum_gradients(self, learned: list[Gradients]) -> None:
        """Add up the micro-batches' gradients, in their order."""
        total = [self.flat_views[number] for number in self.in_use]
        first, *others = learned
        torch._foreach_copy_(total, first.tensors)
        for other in others:
            torch._foreach_add_(total, other.tensors)

    def update_weights(self, learned: list[Gradients]) -> tuple[Tensor, Tensor]:
        """Return whether the update was skipped, and the sums of the terms of each micro-batch."""
        if self.world_size == 1:
            self.sum_gradients(learned)
        for parameter in self.parameters:
            parameter.grad = None
        for number in self.in_use:
            self.parameters[number].grad = self.flat_views[number]
        skipped = update(
            self.model, self.optimizer, self.scaler, times=1, max_grad_norm=self.max_grad_norm
        )
        return skipped, torch.stack([one.sums for one in learned])

    def view_tensors(self) -> list[Tensor]:
        return self.view.tensors() if self.view else []

    def teacher_tensors(self, part: slice) -> list[Tensor]:
        return [] if self.teacher_logits is None else [self.teacher_logits[part]]

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
    graph: Literal["auto", "off"],
    shards: int,
    precision: Precision,
    seed: int,
    batch_size: int,
    max_grad_norm: float | None,
    sam: SamConfig | None,
    reduce_precision: ReducePrecision,
    keep_buffers: bool = False,
) -> StepFn:
    """How to take a step: recorded on a GPU where that can be, else `train_step` under DDP.

    To be built anew when other parameters learn. `keep_buffers`: one that is left out because a
    number was not finite leaves no trace in running statistics.
    """
    keeping = (
        partial(restore_buffers_on_skip, model) if keep_buffers else lambda take_step: take_step
    )
    if graph == "auto" and accelerator.device.type == "cuda":
        reason = unsupported_reason(model, optimizer, precision=precision, sam=sam)
        if reason is None:
            log.info(f"run.graph: after {WARM_UP} steps the step is recorded, then replayed")
            captured = GraphedStep(
                model,
                objective,
                optimizer,
                device=accelerator.device,
                world_size=accelerator.num_processes,
                precision=precision,
                seed=seed,
                batch_size=batch_size,
                max_grad_norm=max_grad_norm,
                reduce_precision=reduce_precision,
                new_recorder=GraphRecorder,
            )
            return keeping(captured)
        log.info(f"run.graph: the step is not recorded: {reason}")
    by_hand = partial(
        train_step,
        accelerator,
        wrap(accelerator, model, shards=shards, reduce_precision=reduce_precision),
        objective,
        optimizer,
        scaler,
        precision=precision,
        seed=seed,
        batch_size=batch_size,
        max_grad_norm=max_grad_norm,
        sam=sam,
    )
    return keeping(by_hand)


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
    precision: Precision,
    sam: SamConfig | None,
) -> str | None:
    """Why a step cannot be recorded on a GPU, or None."""
    if precision == "fp16":
        return "the scaler of fp16 reads a number in each step"
    if sam:
        return "optim.sam changes the weights within a step"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} has no fused form, so a number is read in each step"
    if getattr(model, "second_size", None):
        return "model.second_size draws on the host"
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        return "model.grad_checkpointing keeps the state of generators"
    return None
