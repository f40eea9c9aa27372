"""Compute and store the logits of a recipe's cached teachers."""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # before the slow imports, so that an early signal is not lost

import signal
import sys
from pathlib import Path

from cifar_dist.utils.cli import add_recipe, command_parser, parse_recipe
from cifar_dist.utils.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "cache_logits",
        "Store the logits of a recipe's teachers with `placement: cached` for each view of each "
        "training row. The student then reads the file instead of running the teacher. If it is "
        "interrupted, run the same command again to resume.",
        "python -m cifar_dist.cache_logits recipes/r18_32_kd_cached.yaml",
        "accelerate launch -m cifar_dist.cache_logits recipes/r18_32_kd_cached.yaml augment.views=16",
    )
    add_recipe(parser, "recipe of a student")
    parser.add_argument(
        "--sharded", action="store_true", help="shard the teacher's weights over the processes"
    )
    parser.add_argument(
        "--force", action="store_true", help="start from the beginning and replace an earlier cache"
    )
    options = parse_recipe(parser, arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.distributed.context import DistContext
    from cifar_dist.distributed.launch import set_slurm_env
    from cifar_dist.inference.logit_caching import cache_teacher
    from cifar_dist.recipe.load import load_recipe
    from cifar_dist.recipe.session import distributed_session, resolve_precision
    from cifar_dist.utils.log import log, log_to_terminal

    set_slurm_env()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    cached = [teacher for teacher in recipe.all_teachers if teacher.placement == "cached"]
    if not cached:
        raise UserError(
            f"{options.recipe}: no teacher to cache; add teacher.placement=cached augment.views=8"
        )
    if not (Path(recipe.data.path) / "digest.json").exists():
        raise UserError(
            f"there is no data in {Path(recipe.data.path).absolute()}; set data.path=FOLDER, or run "
            f"`python -m cifar_dist.prepare --output {recipe.data.path}`"
        )
    signals.save_on_interrupt()
    stop = 0
    with distributed_session(recipe) as accelerator:
        context = DistContext.of(accelerator)
        recipe = resolve_precision(recipe, context, accelerator.device)
        for teacher in cached:
            stop = stop or cache_teacher(
                recipe,
                teacher,
                sharded=options.sharded,
                force=options.force,
                context=context,
                device=accelerator.device,
            )
    if stop:
        log.info(f"stopped by {signal.Signals(stop).name}; run the same command again to resume")
        return signals.STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
