"""Say what a trained run sees in pictures: files of any size, folders of them, or rows of a split."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from cifar_dist.data.augment.image_ops import SIDE
from cifar_dist.data.dataset import load_split
from cifar_dist.inference.trained_model import TrainedModel, load_trained_model
from cifar_dist.reporting.images import png
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write, check_writable, write_json
from cifar_dist.utils.log import log, log_to_terminal

ENDINGS = {  # of files in folders
    *(".apng", ".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2"),
    *(".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
}
TOP = 5


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    label: str
    superclass: str
    probability: float  # 0 ... 1


@dataclass(frozen=True, kw_only=True)
class Prediction:
    picture: str  # a path, or test:7
    scores: list[ClassScore]  # the likeliest first
    truth: str | None  # known for rows of a split


def read_picture(path: Path) -> Tensor:
    """A file's centre square as uint8 [3, 32, 32], shrunk as CIFAR's own pictures were.

    The model was trained on pictures of 32 px, whatever size it enlarges them to.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                upright = eight_bits(ImageOps.exif_transpose(file))
                if upright.has_transparency_data:
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright.convert("RGBA"))
                small = ImageOps.fit(upright.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
    except Exception as error:  # each of Pillow's readers raises what it likes of a broken file
        reason = getattr(error, "strerror", None) or str(error).split(" '")[0]
        reason = reason or type(error).__name__
        raise UserError(f"{path} is no picture that can be read ({reason}); give another") from None
    return torch.from_numpy(numpy.array(small)).permute(2, 0, 1).contiguous()


def eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a pixel to 8, which Pillow would clip to white; ValueError where nobody says the range."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no agreed range; save it with 8 or 16")
    return image


def find_pictures(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The pictures of files and of folders, by path; what cannot be read in a folder is passed over."""
    found = {}
    for path in paths:
        if not path.is_dir():
            found[str(path)] = read_picture(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
        for file in inside:
            try:
                found[str(file)] = read_picture(file)
            except UserError as error:
                log.warning(f"passed over: {error}")
    if not found:
        raise UserError("there is no picture in these folders; give others, or files")
    return found


def rows_of(asked: str, data: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """`test:0-99`, `train:5` or `test` -> pictures by name, and their true classes."""
    match = re.fullmatch(r"(train|test)(?::(\d+)(?:-(\d+))?)?", asked)
    if match is None:
        raise UserError(f"--rows {asked}: write test:0-99, train:5 or test")
    name = cast(Literal["train", "test"], match[1])
    split = load_split(data, name)
    first = int(match[2] or 0)
    last = int(match[3] or match[2] or len(split.labels) - 1)
    if not first <= last < len(split.labels):
        raise UserError(f"--rows {asked}: {name} has the rows 0 to {len(split.labels) - 1}")
    pictures = {f"{name}:{row}": split.images[row] for row in range(first, last + 1)}
    return pictures, [names[int(label)] for label in split.labels[first : last + 1]]


def predict(
    usable: TrainedModel, pictures: dict[str, Tensor], truths: Sequence[str] | None = None
) -> list[Prediction]:
    """The likeliest classes of uint8 [3, 32, 32] pictures."""
    logits = usable.logits(torch.stack(list(pictures.values())))
    best = usable.probabilities(logits).topk(min(TOP, len(usable.fine)), dim=1)
    return [
        Prediction(
            picture=name,
            scores=[
                ClassScore(
                    label=usable.fine[at], superclass=usable.superclass[at], probability=value
                )
                for value, at in zip(values, places, strict=True)
            ],
            truth=truths[row] if truths else None,
        )
        for row, (name, values, places) in enumerate(
            zip(pictures, best.values.tolist(), best.indices.tolist(), strict=True)
        )
    ]


def table(predictions: Sequence[Prediction]) -> str:
    """Text for the terminal, a line for each picture."""
    width = min(40, max(len(one.picture) for one in predictions))
    lines = []
    for one in predictions:
        first, *others = one.scores
        mark = (
            ""
            if one.truth is None
            else "  right"
            if one.truth == first.label
            else f"  is {one.truth}"
        )
        rest = ", ".join(f"{guess.label} {100 * guess.probability:.0f}" for guess in others)
        lines.append(
            f"{one.picture[-width:]:<{width}}  {100 * first.probability:5.1f} %  {first.label} "
            f"({first.superclass}){mark}  [{rest}]"
        )
    return "\n".join(lines)


def draw_predictions(pictures: Sequence[Tensor], predictions: Sequence[Prediction]) -> Tensor:
    """The pictures as the model is shown them, each over its top three: uint8 [3, H, W]."""
    side, text, across = 160, 52, 6
    down = -(-len(pictures) // across)
    page = Image.new("RGB", (across * (side + 8), down * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for place, (picture, one) in enumerate(zip(pictures, predictions, strict=True)):
        x, y = place % across * (side + 8), place // across * (side + text)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        wrong = one.truth is not None and one.truth != one.scores[0].label
        for line, guess in enumerate(one.scores[:3]):
            colour = "#b02020" if wrong and line == 0 else "black" if line == 0 else "#606060"
            pen.text(
                (x + 2, y + side + 2 + 15 * line),
                f"{100 * guess.probability:3.0f} % {guess.label}",
                fill=colour,
            )
    return torch.from_numpy(numpy.array(page)).permute(2, 0, 1)


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "predict",
        "Say what a trained run sees in pictures. Files may have any size: the centre square is "
        "shrunk to 32 px, as CIFAR's own pictures were.",
        "python -m cifar_dist.predict runs/r18_32 cat.jpg holiday/ --save-image seen.png",
        "python -m cifar_dist.predict runs/r18_32 --rows test:0-99 --json predictions.json",
    )
    parser.add_argument("run", type=Path, help="a run folder, like runs/r18_32")
    parser.add_argument(
        "images",
        nargs="*",
        default=[],
        type=Path,
        metavar="IMAGE",
        help="files, or folders of them",
    )
    parser.add_argument("--rows", metavar="ROWS", help="rows of the data: test:0-99, train:5, test")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the top five of each as JSON"
    )
    parser.add_argument("--save-image", type=Path, metavar="FILE", help="draw them into a PNG")
    parser.add_argument("--checkpoint", metavar="NAME", help="default: the newest")
    parser.add_argument("--data", type=Path, help="another place of the run's data")
    options = parser.parse_intermixed_args(arguments)

    log_to_terminal()
    if bool(options.images) == bool(options.rows):
        raise UserError("give pictures or --rows, one of them")
    written = [path for path in (options.json, options.save_image) if path]
    for path in written:
        check_writable(path)
    usable = load_trained_model(options.run, options.checkpoint, options.data)
    truths = None
    if options.rows:
        data = options.data or Path(usable.recipe.data.path)
        pictures, truths = rows_of(options.rows, data, usable.fine)
    else:
        pictures = find_pictures(options.images)
    predictions = predict(usable, pictures, truths)
    if options.json:
        write_json(options.json, [asdict(one) for one in predictions])
    if options.save_image:
        atomic_write(
            options.save_image, png(draw_predictions(list(pictures.values()), predictions))
        )
    print(table(predictions), flush=True)
    if usable.temperature is None:
        log.info(
            "probabilities are not calibrated: python -m cifar_dist.evaluate fits a temperature "
            "for runs with data.val_size"
        )
    for path in written:
        log.info(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
