"""Export a trained run as a folder for timm, ONNX, torch.export, or as a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import check_output, command_parser
from cifar_dist.utils.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "export",
        "Export a trained run as a folder with a model card. The exported model is loaded again and "
        "compared with the original before the folder is kept. Exports the averaged weights if the "
        "recipe has `averaging`.",
        "python -m cifar_dist.export runs/r18_224 --to timm       # timm.create_model('local-dir:...')",
        "python -m cifar_dist.export runs/r18_32 --to onnx --uint8 --output exported/r18_32",
        "python -m cifar_dist.export runs/r50_224 --to teacher    # teacher.run=exported/r50_224_teacher",
    )
    parser.add_argument("run", type=Path, help="run folder, like runs/r18_32")
    parser.add_argument(
        "--to", choices=("timm", "onnx", "pt2", "teacher"), required=True, help="format"
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="onnx, pt2: take uint8 images of the data's size; the model resizes and normalizes them",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: exported/RECIPE_FORMAT"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="like step_00000600 (default: the newest)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of the run's data, if it has moved; for class names",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.exporting.formats import EXPORT_FILES, export
    from cifar_dist.inference.trained_model import load_trained_model
    from cifar_dist.utils.log import log, log_to_terminal

    log_to_terminal()
    if options.uint8 and options.to not in ("onnx", "pt2"):
        raise UserError(f"--uint8 is for onnx and pt2, not for --to {options.to}; remove it")
    model = load_trained_model(options.run, options.checkpoint, options.data)
    output = options.output or Path("exported") / f"{model.recipe.name}_{options.to}"
    check_output(output, EXPORT_FILES, force=options.force)
    check = export(model, options.run, output, to=options.to, uint8=options.uint8)
    log.info(f"saved {model.checkpoint} to {output} ({options.to}); {check}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
