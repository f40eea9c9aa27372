"""Train one recipe: the walk from pickles to a finished run. Read it top to bottom.

A run is a fold over the step. All that is random is derived from (seed, step, row), so stopping,
going on and another number of processes are one thing: start again at the checkpoint's step.
"""

from __future__ import annotations

from cifar_dist import signals

if __name__ == "__main__":
    signals.install()  # before torch: a signal kills a Python process that has no handler yet

import hashlib
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cifar_dist import __version__
from cifar_dist.command_line import add_recipe, command_parser
from cifar_dist.data.arrow import class_names, data_digest, open_splits, read_digest
from cifar_dist.data.augment import Augment
from cifar_dist.data.batches import count_steps, holdout_rows, train_batches
from cifar_dist.data.host_pipeline import Pipeline
from cifar_dist.data.streamed import streamed
from cifar_dist.dry_run import plan
from cifar_dist.engine import lock, results, run_folder
from cifar_dist.engine.checkpoint import load_progress, load_tensors
from cifar_dist.engine.ending import ending_together
from cifar_dist.engine.evaluation import evaluate, refresh_statistics
from cifar_dist.engine.graphed_step import StepFn, build_step
from cifar_dist.engine.host import host_workers
from cifar_dist.engine.metrics import MetricsFile, Window, peak_memory_bytes, peak_reserved_bytes
from cifar_dist.engine.runtime import (
    Ranks,
    adopt_slurm_ranks,
    log,
    log_to_terminal,
    progress_bar,
    rank_mesh,
    start_processes,
)
from cifar_dist.engine.state import State, vote
from cifar_dist.engine.step import check_precision, make_scaler
from cifar_dist.engine.tracking import Tracker
from cifar_dist.engine.watchdog import watched
from cifar_dist.errors import run_command
from cifar_dist.files import write_file
from cifar_dist.keys import key
from cifar_dist.learn.ema import build_average
from cifar_dist.learn.losses import logit_scale
from cifar_dist.learn.objective import Objective
from cifar_dist.learn.optim import build_optimizer, learning_rate, max_lr, set_learning_rate
from cifar_dist.learn.teacher import build_teacher
from cifar_dist.nets.backbones import build_model, fetch_pretrained, num_parameters, pretrained_cfg
from cifar_dist.nets.freeze import first_epochs, freeze, frozen
from cifar_dist.nets.pixels import patch_filters
from cifar_dist.recipe import Recipe, load_recipe, resolved, to_yaml
from cifar_dist.runs import (
    SAMPLE_NOTE,
    check_caches,
    check_world,
    find_teacher,
    finished_before,
    open_run,
    say_finished,
    take_over,
    wait_for_data,
)


def train(recipe: Recipe, accelerator: Accelerator, *, force: bool = False) -> dict[str, Any]:
    """Train, evaluate, log and save one recipe; returns what summary.json says.

    Goes on where an earlier start stopped; `finished` is False when a signal stopped this one.
    """
    ranks, device = Ranks.of(accelerator), accelerator.device
    run, data, folder = recipe.run, recipe.data, recipe.folder
    check_precision(run.precision, device)
    with ExitStack() as stack:
        # One folder, one job, one recipe, one data set, the same teachers.
        ranks.main_does(lambda: stack.enter_context(lock.locked(folder)))
        digest = data_digest(Path(data.path))
        ranks.same("recipe", hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12])
        ranks.same("data set", digest[:12])
        trained = ranks.main_does(lambda: [find_teacher(one) for one in recipe.taught_by])
        ranks.main_does(lambda: check_caches(recipe, trained))
        teachers = [teacher.digest for teacher in trained]
        saved, shards = ranks.main_does(
            lambda: open_run(recipe, data=digest, teachers=teachers, force=force)
        )
        surroundings = run_folder.environment(
            world_size=ranks.world_size, device=device, data=digest, teachers=teachers
        )
        shards = shards or run.shards or ranks.world_size
        check_world(recipe, shards=shards, world_size=ranks.world_size)

        # Pickles became Arrow before; here it becomes uint8 [N, 3, 32, 32] on the device.
        train_split, test_split, check_data = open_splits(Path(data.path), device, data.place)
        rows, held_rows = torch.arange(len(train_split.labels)), None
        if data.holdout:
            rows, held_rows = holdout_rows(train_split.labels, data.holdout)
        steps_per_epoch = count_steps(len(rows), run.batch_size)
        total_steps = run.epochs * steps_per_epoch

        # The state of the run: at step 0, or as it was saved.
        if saved is None:
            ranks.main_does(lambda: fetch_pretrained(recipe.model))
        torch.manual_seed(key("weights", run.seed))
        classes = len(class_names(Path(data.path)))
        model = build_model(recipe.model, classes, load_tensors(saved, "model") if saved else None)
        if saved is None and recipe.model.whiten:
            whiten = partial(patch_filters, model.pixels, train_split.images[rows[:2000]].cpu())
            model.pixels.filters.copy_(ranks.main_does(whiten))
        model.to(device).to(memory_format=torch.channels_last)
        teacher = build_teacher(
            recipe.taught_by,
            trained,
            num_classes=classes,
            device=device,
            mesh=lambda over: rank_mesh(device, ranks.world_size, over=over),
        )
        if teacher and teacher.parameters_here:
            held = " ".join(ranks.each(f"{teacher.parameters_here:,}"))
            log.info(f"the teacher's parameters on each rank: {held}")
        batches_of = partial(
            train_batches,
            rows=rows,
            seed=run.seed,
            shuffle=data.shuffle,
            batch_size=run.batch_size,
            shards=shards,
            start_step=load_progress(saved)["step"] if saved else 0,
            rank=ranks.rank,
            world_size=ranks.world_size,
            repeats=recipe.augment.repeats,
        )
        batches = batches_of(train_split)
        host = stack.enter_context(host_workers(recipe.augment, train_split, ranks, run.epochs))
        ahead = stack.enter_context(streamed(recipe.augment, train_split, rows, batches_of))
        augment = Augment(recipe.augment, train_split, rows, host=host or ahead)
        objective = Objective(augment, recipe.losses, teacher)
        freeze(model, recipe.model.freeze, epoch=None)  # for all that ever learns
        begins = first_epochs(model, recipe.model.freeze)
        state = State(
            model=model,
            optimizer=build_optimizer(recipe.optim, model, begins),
            scaler=make_scaler(run.precision, device),
            ema=build_average(
                recipe.ema, model, steps_per_epoch=steps_per_epoch, total_steps=total_steps
            ),
            window=Window(objective.names, shards=shards, device=device),
        )
        if saved is not None:
            state.restore(saved, ranks, total_steps=total_steps)
        ranks.main_does(lambda: take_over(recipe, surroundings, saved))
        if run.compile:
            model.compile()

        # What the run leaves.
        metrics_file = MetricsFile(folder / "metrics.jsonl")
        tracker = Tracker()
        last_look = ranks.main_does(lambda: metrics_file.truncate(state.step, state.evaluated_step))
        state.evaluated_step = min(state.evaluated_step, last_look)  # a lost one is due again
        if ranks.is_main:
            tracker.start(recipe.tracking, folder, resolved(recipe), surroundings, recipe.taught_by)
        log.info(
            f"{recipe.name}: {recipe.model.backbone}, {len(rows):,} rows, {run.epochs} epochs of "
            f"{steps_per_epoch} steps, batch {run.batch_size} in {shards} shard(s)"
            + (f"; goes on at step {state.step} of {total_steps}" if saved else "")
        )
        unwatch = stack.enter_context(
            watched(ranks, lambda: state.step, seconds=run.timeout_seconds, shards=shards)
        )
        bar = stack.enter_context(progress_bar(state.step, total_steps, shown=ranks.is_main))

        def tell(kind: str, values: dict[str, Any]) -> None:
            line = {"kind": kind, "step": state.step, "epoch": state.step / steps_per_epoch}
            line |= values
            ranks.main_does(lambda: results.publish(line, metrics_file, tracker, epochs=run.epochs))

        look = partial(
            evaluate,
            state.evaluated_model,
            precision=run.precision,
            logit_scale=logit_scale(recipe.losses.values()),
            ranks=ranks,
        )
        why_no_more = partial(
            state.why_no_more,
            epochs_without_gain=run.stop_after_epochs_without_gain,
            steps_per_epoch=steps_per_epoch,
        )
        lr_of = partial(
            learning_rate,
            recipe.optim,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
        )
        evaluation, test_rows = None, torch.arange(len(test_split.labels))
        check_data()  # has run beside
        take_step: StepFn | None = None
        to_vote = 0  # steps; counted, so that a rank that lost count of its own votes all the same
        while True:
            # What is due after `step` updates; nothing here happens twice at a step.
            step, epoch = state.step, state.step // steps_per_epoch
            ended_early = step < total_steps and why_no_more()
            at_end = step == total_steps or bool(ended_early)
            stop, save_now, votes = 0, False, to_vote == 0
            if votes:
                stop, save_now, to_vote = vote(
                    state, ranks, save_every_minutes=run.save_every_minutes
                )
                stop = 0 if at_end else stop
            report_due = state.window.steps and (at_end or step % run.report_every_steps == 0)
            look_due = step > state.evaluated_step and not stop
            look_due &= at_end or step % (run.eval_every_epochs * steps_per_epoch) == 0
            save_due = step > state.saved_step and (at_end or stop or save_now)
            if report_due or look_due or save_due:
                state.check_numbers(ranks, most_skips=run.most_skips, warn=bool(report_due))
            if report_due:
                numbers = state.window.report(batch_size=run.batch_size, may_skip=run.may_skip)
                numbers |= {"lr": max_lr(state.optimizer, lr_of(step - 1))}
                tell("train", numbers | {"memory_bytes": peak_memory_bytes(device)})
                state.window.clear()
            if look_due:
                with state.window.paused():
                    if state.ema and state.ema.mixes_statistics(step):
                        refresh_statistics(
                            state.ema.model,
                            augment.again(),  # workers are further on
                            train_split,
                            rows,
                            seed=run.seed,
                            epoch=epoch - 1,  # the last one
                            precision=run.precision,
                            ranks=ranks,
                            frozen=frozen(begins, epoch - 1),
                        )
                    evaluation = look(test_split, test_rows)
                    numbers = dict(evaluation.metrics)
                    if held_rows is not None:
                        held_out = look(train_split, held_rows).metrics
                        numbers |= {f"val_{name}": value for name, value in held_out.items()}
                        save_due |= state.note_held_out(held_out["top1"])
                    tell("eval", numbers)
                    state.evaluated_step = step
                if not at_end and why_no_more():
                    continue  # now this is the end, and other things are due
            if save_due:
                facts = {"shards": shards, "data": digest, "teachers": teachers}
                facts["world_size"], keep = ranks.world_size, run.keep_checkpoints
                with state.window.paused():
                    ranks.main_does(metrics_file.sync)
                    state.save(folder / "checkpoints", ranks, keep=keep, facts=facts)
            if stop or at_end:
                state.finish_saving(ranks)
                break
            new_epoch = step % steps_per_epoch == 0
            if host and (votes or new_epoch) and not host.show(epoch):
                to_vote = 0  # a signal came before the epoch's pictures
                continue

            # DDP reduces what learned when it was made, so the step is made anew where that changes.
            if take_step is None or new_epoch:
                changed = freeze(model, recipe.model.freeze, epoch=epoch)
                if changed or take_step is None:
                    take_step = None  # its recordings' memory is free for the next ones
                    take_step = build_step(
                        accelerator,
                        model,
                        objective,
                        state.optimizer,
                        state.scaler,
                        cuda_graphs=run.cuda_graphs,
                        shards=shards,
                        precision=run.precision,
                        seed=run.seed,
                        batch_size=run.batch_size,
                        max_grad_norm=recipe.optim.max_grad_norm,
                        sam=recipe.optim.sam,
                        reduce_precision=run.reduce_precision,
                        keep_buffers=run.may_skip,
                    )

            # The life of a sample: rows -> view -> outputs -> terms -> gradient -> weights.
            set_learning_rate(state.optimizer, lr_of(step))
            model.train_size = recipe.model.train_size(epoch)
            made = take_step(next(batches), step=step)
            state.window.add(made)
            state.step, to_vote = state.step + 1, to_vote - 1
            if state.ema:
                state.ema.update(model, state.step)
            bar.update()

        # The last numbers are the headline, whatever an earlier epoch had.
        unwatch()
        peaks, reserved = zip(
            *ranks.each((peak_memory_bytes(device), peak_reserved_bytes(device))), strict=True
        )
        log.info(
            f"peak memory of each rank, MiB: {' '.join(str(peak >> 20) for peak in peaks)}"
            + (f" (reserved: {max(reserved) >> 20})" if max(reserved) else "")
        )
        facts = {
            "name": recipe.name,
            "shards": shards,
            "world_size": ranks.world_size,
            "parameters": num_parameters(model),
            "peak_memory_bytes": max(peaks),
            **({"peak_reserved_bytes": max(reserved)} if max(reserved) else {}),
            "epochs": state.step / steps_per_epoch,
            "steps": state.step,
            "seconds": state.seconds,
            "finished": at_end,
            **({"ended_early": ended_early} if ended_early else {}),
            **({"stopped_by": signal.Signals(stop).name} if stop else {}),
        }
        if at_end and evaluation is None:  # all was done but the summary
            evaluation = look(test_split, test_rows)

        def conclude() -> dict[str, Any]:
            lines = metrics_file.read()
            summary = results.summarize(facts, lines)
            if evaluation is not None and at_end:
                results.write_predictions(folder, evaluation)
            results.write_summary(folder, summary)
            if stop:  # slurm/train.sh reads it to know whether to queue the job again
                write_file(folder / "stopped", f"{signal.Signals(stop).name}\n")
            tracker.finish(summary, evaluation if at_end else None)
            return summary

        return ranks.main_does(conclude)


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "train",
        "Train a recipe on one process or many; start it again to go on.",
        "python -m cifar_dist.train recipes/debug.yaml",
        "accelerate launch -m cifar_dist.train recipes/r50_224.yaml run.epochs=20",
        "accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml -m cifar_dist.train "
        "recipes/r50_224.yaml name=r50_224_s1 run.seed=1",
    )
    add_recipe(parser, "a YAML file, see recipes/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its cost"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although the recipe has changed"
    )
    parser.add_argument("--version", action="version", version=f"cifar_dist {__version__}")
    options = parser.parse_intermixed_args(arguments)

    adopt_slurm_ranks()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        print(plan(recipe))
        return 0
    pretrained_cfg(recipe.model.backbone)  # all refuse a wrong name before anything is downloaded
    build_optimizer(recipe.optim, torch.nn.Linear(1, 1))
    if recipe.augment.host:
        Pipeline(recipe.augment.host)
    path, source = Path(recipe.data.path), recipe.data.source
    has_data = (path / "digest.json").exists()
    is_sample = read_digest(path)["content"] == "sample" if has_data else source == "sample"
    if is_sample:
        log.info(SAMPLE_NOTE)
    if not has_data and not wait_for_data(path, source):
        return signals.STOPPED
    summary = finished_before(recipe)
    if summary is not None and not options.force:
        say_finished(recipe, summary, is_sample=is_sample)
        return 0
    accelerator = start_processes(
        timeout_seconds=recipe.run.timeout_seconds,
        threads=recipe.run.threads,
        deterministic=recipe.run.deterministic,
    )
    log.info(
        f"cifar_dist {__version__}: {accelerator.num_processes} process(es) train on "
        f"{accelerator.device.type}, {recipe.run.precision}, {torch.get_num_threads()} CPU thread(s) each"
    )
    with ending_together(accelerator):
        summary = train(recipe, accelerator, force=options.force)
    if not summary["finished"]:
        log.info(
            f"{recipe.name}: stopped by {summary['stopped_by']} at step "
            f"{summary['steps']}, all saved in {recipe.folder}; start it again to go on"
        )
        return signals.STOPPED
    say_finished(recipe, summary, is_sample=is_sample)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
