"""Classify image files of any size, folders of images, or rows of a data set."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "predict",
        "Classify images with a trained run. Files may have any size: the center square is resized "
        "to the size of the training images, 32 px for CIFAR.",
        "python -m cifar_dist.predict runs/r18_32 cat.jpg holiday/ --save-image predictions.png",
        "python -m cifar_dist.predict runs/r18_32 --rows test:0-99 --json predictions.json",
    )
    parser.add_argument("run", type=Path, help="run folder, like runs/r18_32")
    parser.add_argument(
        "images", nargs="*", default=[], type=Path, metavar="IMAGE", help="image files or folders"
    )
    parser.add_argument(
        "--rows", metavar="ROWS", help="rows of the data instead of files: test:0-99, train:5, test"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the five best classes as JSON"
    )
    parser.add_argument(
        "--save-image", type=Path, metavar="FILE", help="draw images and predictions in a PNG file"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="like step_00000600 (default: the newest)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of the run's data, if it has moved"
    )
    options = parser.parse_intermixed_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.inference.prediction import (
        draw_predictions,
        find_images,
        format_predictions,
        predict,
        read_rows,
        to_json,
    )
    from cifar_dist.inference.trained_model import load_trained_model
    from cifar_dist.reporting.images import png
    from cifar_dist.utils.files import atomic_write, check_writable, write_json
    from cifar_dist.utils.log import log, log_to_terminal

    log_to_terminal()
    if bool(options.images) == bool(options.rows):
        raise UserError("give either image files or --rows")
    outputs = [path for path in (options.json, options.save_image) if path]
    for path in outputs:
        check_writable(path)
    model = load_trained_model(options.run, options.checkpoint, options.data)
    truths = None
    if options.rows:
        data = options.data or Path(model.recipe.data.path)
        images, truths = read_rows(options.rows, data, model.fine, model.recipe.data.labels)
    else:
        images = find_images(options.images, model.data_size)
    predictions = predict(model, images, truths)
    if options.json:
        write_json(options.json, [to_json(prediction) for prediction in predictions])
    if options.save_image:
        drawing = draw_predictions(list(images.values()), predictions)
        atomic_write(options.save_image, png(drawing))
    print(format_predictions(predictions), flush=True)
    if model.temperature_note is None:
        log.info(
            "probabilities are not calibrated; for a run with data.val_size, "
            f"`python -m cifar_dist.evaluate {options.run}` fits a temperature"
        )
    else:
        log.info(f"probabilities at {model.temperature_note}")
    if not model.is_cifar_100:
        log.info(f"{options.run} was trained on {model.trained_on}")
    for path in outputs:
        log.info(f"saved to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
