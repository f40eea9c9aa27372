"""Take a trained run elsewhere: as a folder for timm, ONNX, a torch.export program, or a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.exporting.formats import OURS, export
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.utils.cli import check_output, command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.log import log, log_to_terminal


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "export",
        "Write a trained run as a folder that others load, with a model card; what is written is "
        "loaded again and compared first. The weights are those the run is judged by (its average, if "
        "it has one); a teacher is never among them.",
        "python -m cifar_dist.export runs/r18_224 --to timm       # timm.create_model('local-dir:...')",
        "python -m cifar_dist.export runs/r18_32 --to onnx --uint8 --output exported/r18_32",
        "python -m cifar_dist.export runs/r50_224 --to teacher    # teacher.run=exported/r50_224_teacher",
    )
    parser.add_argument("run", type=Path, help="a run folder, like runs/r18_32")
    parser.add_argument(
        "--to", choices=("timm", "onnx", "pt2", "teacher"), required=True, help="the folder's kind"
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="onnx, pt2: take uint8 pictures of 32 px; resizing and normalisation are inside",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: exported/NAME_FORMAT"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="default: the newest")
    parser.add_argument(
        "--data", type=Path, help="another place of the run's data, for class names"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)

    log_to_terminal()
    if options.uint8 and options.to not in ("onnx", "pt2"):
        raise UserError(f"--uint8 is for onnx and pt2; --to {options.to} has a fixed form")
    usable = load_trained_model(options.run, options.checkpoint, options.data)
    output = options.output or Path("exported") / f"{usable.recipe.name}_{options.to}"
    check_output(output, OURS, force=options.force)
    said = export(usable, options.run, output, to=options.to, from_bytes=options.uint8)
    log.info(f"{output}: {options.to} of {usable.checkpoint}; {said}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
