"""Build albumentations pipelines from data and apply them to single images.

A pipeline is a list of `{Name: {arguments}}`. Only the names below are looked up, so a recipe cannot
run code. This module does not import torch, so workers start within a second.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from inspect import signature
from typing import Any

import numpy

from cifar_dist.utils.errors import UserError, first_line
from cifar_dist.utils.suggest import closest

Transforms = Sequence[Mapping[str, Mapping[str, Any]]]

VERSION = "2.0.8"  # of albumentations; defaults and results differ between versions
REMEDY = f"pip install albumentations=={VERSION}"
GROUPS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")  # these have a list of `transforms`
# Transforms that need only an image and plain arguments, and return an image of the same kind.
SINGLE = (
    *("AdditiveNoise", "AdvancedBlur", "Affine", "AutoContrast", "Blur", "CLAHE", "ChannelDropout"),
    *("ChannelShuffle", "ChromaticAberration", "CoarseDropout", "ColorJitter", "CropAndPad", "D4"),
    *("Defocus", "Downscale", "ElasticTransform", "Emboss", "Equalize", "Erasing", "FancyPCA"),
    *("GaussNoise", "GaussianBlur", "GlassBlur", "GridDistortion", "GridDropout"),
    *("GridElasticDeform", "HEStain", "HorizontalFlip", "HueSaturationValue", "ISONoise"),
    *("Illumination", "ImageCompression", "InvertImg", "MedianBlur", "Morphological", "MotionBlur"),
    *("MultiplicativeNoise", "NoOp", "OpticalDistortion", "Perspective", "PiecewiseAffine"),
    *("PixelDropout", "PlanckianJitter", "PlasmaBrightnessContrast", "PlasmaShadow", "Posterize"),
    *("RGBShift", "RandomBrightnessContrast", "RandomFog", "RandomGamma", "RandomGravel"),
    *("RandomGridShuffle", "RandomRain", "RandomResizedCrop", "RandomRotate90", "RandomShadow"),
    *("RandomSizedCrop", "RandomSnow", "RandomSunFlare", "RandomToneCurve", "RingingOvershoot"),
    *("Rotate", "SafeRotate", "SaltAndPepper", "Sharpen", "ShiftScaleRotate", "ShotNoise"),
    *("Solarize", "Spatter", "SquareSymmetry", "Superpixels", "ThinPlateSpline", "ToGray"),
    *("ToSepia", "Transpose", "UnsharpMask", "VerticalFlip", "XYMasking", "ZoomBlur"),
)
MAX_DEPTH = 8  # of nested groups
TRIALS = 16  # random images that a new pipeline is tested with


def check_names(transforms: Any, *, where: str = "albumentations", depth: int = 0) -> None:
    """Raise UserError unless `transforms` is a list of `{Name: {arguments}}` with known names.

    This does not import albumentations.
    """
    if not isinstance(transforms, list | tuple) or not transforms or depth > MAX_DEPTH:
        raise UserError(f"{where}: write a list like [HorizontalFlip: {{p: 0.5}}]")
    for index, transform in enumerate(transforms):
        here = f"{where}.{index}"
        if not isinstance(transform, Mapping) or len(transform) != 1:
            raise UserError(f"{here}: write one name with its arguments, like HorizontalFlip: {{}}")
        ((name, arguments),) = transform.items()
        if name not in (*SINGLE, *GROUPS):
            near = closest(name, (*SINGLE, *GROUPS))
            hint = (
                f"did you mean {near}?"
                if near
                else "see SINGLE in cifar_dist/data/augment/albumentations_pipeline.py"
            )
            raise UserError(f"{here}: {name} is not a supported transform; {hint}")
        if not isinstance(arguments, Mapping):
            raise UserError(f"{here}.{name}: write its arguments as a mapping, {{}} for none")
        if name in GROUPS:
            inner = arguments.get("transforms")
            check_names(inner, where=f"{here}.{name}.transforms", depth=depth + 1)


class Pipeline:
    """Apply transforms to an image: `pipeline(image, seed, row)` depends on these arguments only."""

    def __init__(self, transforms: Transforms, *, image_size: int, trials: int = TRIALS) -> None:
        """Build the transforms and apply them to `trials` random images of `image_size` px.

        Raises UserError for unsupported names, arguments or output shapes, and if albumentations is
        not installed.
        """
        check_names(transforms, where="augment.albumentations")
        library, self.image_size = load_library(), image_size
        # Names of a recipe are looked up in this dict only.
        classes = {name: vars(library)[name] for name in (*SINGLE, *GROUPS)}
        self.compose = library.Compose([build(classes, transform) for transform in transforms])
        # All transforms, nested ones included, draw from these two generators.
        self.bits = numpy.random.Philox(0)
        self.generator, self.python = numpy.random.Generator(self.bits), random.Random(0)
        self.compose.set_random_state(self.generator, self.python)
        self.start: Any = self.bits.state
        shape = (trials, 3, image_size, image_size)
        images = numpy.random.default_rng(0).integers(0, 256, shape, numpy.uint8)
        for row, image in enumerate(images):
            self(image, 0, row)

    def reseed(self, seed: int, row: int) -> None:
        """Restart both generators; (seed, row) is the key of the counter-based Philox.

        Assigning the state also discards the rest of the last block; `seed` discards a spare Gaussian.
        """
        self.start["state"]["key"][:] = seed, row
        self.bits.state = self.start
        self.python.seed(int(self.generator.integers(1 << 63)))

    def __call__(self, image: numpy.ndarray, seed: int, row: int) -> numpy.ndarray:
        """Return the transformed image, uint8 [3, S, S], and leave `image` unchanged."""
        self.reseed(seed, row)
        pixels = numpy.ascontiguousarray(image.transpose(1, 2, 0))
        try:
            result = self.compose(image=pixels)["image"]
        except Exception as error:
            raise UserError(
                f"augment.albumentations failed at the image of row {row}: {first_line(error)}; "
                "remove the transform that cannot process it"
            ) from error
        if result.shape != pixels.shape or result.dtype != numpy.uint8:
            found, expected = ("x".join(map(str, shape)) for shape in (result.shape, pixels.shape))
            raise UserError(
                f"augment.albumentations returned an image of {found} {result.dtype} instead of "
                f"{expected} uint8; remove the transform that does this, or set its size to "
                f"{self.image_size}"
            )
        return result.transpose(2, 0, 1)


def load_library() -> Any:
    """Import the required version of albumentations, single-threaded, without network access."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would check for a newer version
    try:
        installed = metadata.version("albumentations")
        import albumentations
        import cv2
    except ImportError as error:
        raise UserError(
            f"augment.albumentations needs albumentations ({error}): {REMEDY}"
        ) from error
    if installed != VERSION:
        raise UserError(
            f"augment.albumentations needs albumentations {VERSION}, but {installed} is installed: {REMEDY}"
        )
    cv2.setNumThreads(0)
    return albumentations


def build(classes: Mapping[str, Any], transform: Mapping[str, Mapping[str, Any]]) -> Any:
    """Build a transform whose names have been checked; raise UserError for invalid arguments."""
    ((name, given),) = transform.items()
    cls, arguments = classes[name], dict(given)
    known = [argument for argument in signature(cls.__init__).parameters if argument != "self"]
    for argument in arguments:
        if argument not in known:
            near = closest(argument, known)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"augment.albumentations: {name}.{argument}: unknown argument; {hint}")
    if name in GROUPS:
        arguments["transforms"] = [build(classes, inner) for inner in arguments["transforms"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # albumentations warns of arguments that it ignores
        for harmless in ("ShiftScaleRotate is a special case of", "This augmenter is very slow"):
            warnings.filterwarnings("ignore", harmless)
        try:
            return cls(**arguments)
        except ZeroDivisionError as error:
            raise UserError(
                f"augment.albumentations: {name}: at least one of its transforms needs p > 0"
            ) from error
        except Exception as error:
            problems = "; ".join(validation_messages(error)) or first_line(error)
            raise UserError(f"augment.albumentations: {name}: {problems}") from error


def validation_messages(error: Exception) -> Iterator[str]:
    """Yield the message of albumentations' validator for each invalid argument."""
    errors = getattr(error.__cause__, "errors", list)
    for problem in errors():
        argument = ".".join(str(part) for part in problem["loc"])
        got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
        yield f"{argument}: {problem['msg'].removeprefix('Value error, ')}{got}".lstrip(": ")
