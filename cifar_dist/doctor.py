"""Check a launch: processes, code, recipe, data, storage and network, before a training starts."""

from __future__ import annotations

import sys

from cifar_dist.utils.cli import add_recipe, command_parser, parse_recipe
from cifar_dist.utils.errors import is_main_rank, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "doctor",
        "Check a launch: start this command as the training will be started. Exit code 0: ready to "
        "train; 2: fix the lines marked BAD.",
        "python -m cifar_dist.doctor recipes/r18_32.yaml",
        "accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml -m cifar_dist.doctor "
        "recipes/r50_224.yaml",
        "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/doctor.sh recipes/r50_224.yaml",
    )
    add_recipe(parser)
    options = parse_recipe(parser, arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.distributed.launch import set_slurm_env
    from cifar_dist.recipe.load import load_recipe
    from cifar_dist.training.launch_check import check_launch
    from cifar_dist.utils.log import log_to_terminal

    set_slurm_env()
    log_to_terminal()
    checks = check_launch(load_recipe(options.recipe, options.overrides))
    if is_main_rank():
        for check in checks:
            mark = {True: "ok ", False: "BAD", None: "   "}[check.ok]
            print(f"{mark}  {check.name:<14} {check.message}")
    return 2 if any(check.ok is False for check in checks) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
