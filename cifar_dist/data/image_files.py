"""Read image files of any format, size and color mode as small square RGB images."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from cifar_dist.utils.errors import UserError

SUFFIXES = {  # of image files in folders
    *(".apng", ".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2"),
    *(".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
}
# Pillow's readers of them. Others are never tried: that of EPS would start Ghostscript on the file.
Image.init()
FORMATS = tuple(
    name
    for name in (
        *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000"),
        *("PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
    )
    if name in Image.OPEN  # of this version of Pillow
)


def read_image(source: Path | bytes, size: int, *, name: str | None = None) -> numpy.ndarray:
    """Return the center square of an image, resized to `size` px, as uint8 [3, size, size].

    `source` is a path or the bytes of an image file. Of an animation the first frame is read. EXIF
    rotation is applied, transparency becomes white, gray and CMYK become RGB, 16 bits per pixel
    become 8. UserError, with `name` or the path, if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            content = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(content, formats=FORMATS) as file:
                file.draft("RGB", (4 * size, 4 * size))  # decodes a large JPEG at a smaller scale
                image = _to_eight_bits(ImageOps.exif_transpose(file))
                if image.has_transparency_data:
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                small = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's readers raise exceptions of any type on a damaged file
        reason = getattr(error, "strerror", None) or str(error).split(" '")[0].split(" <")[0]
        reason = reason or type(error).__name__
        raise UserError(
            f"{name or source!s} cannot be read as an image ({reason}); give another"
        ) from None
    return numpy.ascontiguousarray(numpy.asarray(small).transpose(2, 0, 1))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16 bits per pixel to 8, which Pillow would clip; ValueError for 32 bits per pixel."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            "the value range of 32 bits per pixel is undefined; save it with 8 or 16 bits"
        )
    return image


def files_in(folder: Path, *, skip_unreadable: bool = True) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, linked ones included, each folder once.

    Unless `skip_unreadable`, a folder that cannot be read raises OSError.
    """

    def fail(error: OSError) -> None:
        if not skip_unreadable:
            raise error

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link to a parent would never end
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent, name) for name in names)
