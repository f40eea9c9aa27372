"""Floor 1. `augment.albumentations`: albumentations pipelines written as data, one picture at a time.

A pipeline is a list of `{Name: {arguments}}` whose names are those below; nothing else is ever looked
up, so what a recipe says cannot run code. Imports no torch: workers start in a second without it.
"""

from __future__ import annotations

import difflib
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from inspect import signature
from typing import Any

import numpy

from cifar_dist.utils.errors import UserError

Transforms = Sequence[Mapping[str, Mapping[str, Any]]]

VERSION = "2.0.8"  # of albumentations; defaults and pixels move between versions
REMEDY = f"pip install albumentations=={VERSION} (cifar_dist's extra `host-augment`)"
GROUPS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")  # they have a list of `transforms`
# What needs one picture and numbers alone, and gives such a picture back.
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
DEEPEST = 8  # groups within groups
TRIALS = 16  # random pictures that a pipeline changes before it is believed


def check_names(transforms: Any, *, where: str = "host", depth: int = 0) -> None:
    """Refuse what is no list of `{Name: {arguments}}` with known names; imports nothing."""
    if not isinstance(transforms, list | tuple) or not transforms or depth > DEEPEST:
        raise UserError(f"{where}: write a list like [HorizontalFlip: {{p: 0.5}}]")
    for place, one in enumerate(transforms):
        here = f"{where}.{place}"
        if not isinstance(one, Mapping) or len(one) != 1:
            raise UserError(f"{here}: write one name with its arguments, like HorizontalFlip: {{}}")
        ((name, arguments),) = one.items()
        if name not in (*SINGLE, *GROUPS):
            near = difflib.get_close_matches(name, (*SINGLE, *GROUPS), n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/augmentation.md lists what is"
            raise UserError(f"{here}: {name} is not allowed here; {hint}")
        if not isinstance(arguments, Mapping):
            raise UserError(f"{here}.{name}: write its arguments as a mapping, {{}} for none")
        if name in GROUPS:
            inner = arguments.get("transforms")
            check_names(inner, where=f"{here}.{name}.transforms", depth=depth + 1)


class Pipeline:
    """`pipeline(picture, seed, row)`: what these transforms make of a picture, by its key alone."""

    def __init__(self, transforms: Transforms, *, trials: int = TRIALS) -> None:
        """UserError for what is not allowed, not known or not of these shapes, or not installed."""
        check_names(transforms, where="augment.albumentations")
        library = load_library()
        # The names above and nothing else: what a recipe says is looked up in this dict.
        kinds = {name: vars(library)[name] for name in (*SINGLE, *GROUPS)}
        self.compose = library.Compose([build(kinds, one) for one in transforms])
        # All transforms, nested ones too, draw from these two; `rekey` starts both anew.
        self.bits = numpy.random.Philox(0)
        self.generator, self.python = numpy.random.Generator(self.bits), random.Random(0)
        self.compose.set_random_state(self.generator, self.python)
        self.start: Any = self.bits.state
        pictures = numpy.random.default_rng(0).integers(0, 256, (trials, 3, 32, 32), numpy.uint8)
        for row, picture in enumerate(pictures):
            try:
                self(picture, 0, row)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"augment.albumentations: {first_line(error)}") from error

    def rekey(self, seed: int, row: int) -> None:
        """Begin the stream of (seed, row): seed and row are the key of the counter-based Philox.

        The assignment also drops what is left of the last block, and `seed` a spare Gaussian.
        """
        self.start["state"]["key"][:] = seed, row
        self.bits.state = self.start
        self.python.seed(int(self.generator.integers(1 << 63)))

    def __call__(self, picture: numpy.ndarray, seed: int, row: int) -> numpy.ndarray:
        """uint8 [3, 32, 32] -> the same; `picture` stays as it is."""
        self.rekey(seed, row)
        pixels = numpy.ascontiguousarray(picture.transpose(1, 2, 0))
        try:
            found = self.compose(image=pixels)["image"]
        except Exception as error:
            raise UserError(
                f"augment.albumentations failed at the picture of row {row}: {first_line(error)}; remove the "
                "transform that cannot take it"
            ) from error
        if found.shape != (32, 32, 3) or found.dtype != numpy.uint8:
            size = "x".join(str(side) for side in found.shape)
            raise UserError(
                f"augment.albumentations made a picture of {size} {found.dtype} out of one of 32x32x3 uint8; "
                "remove the transform that does, or set its size to 32"
            )
        return found.transpose(2, 0, 1)


def load_library() -> Any:
    """albumentations, of the version that recipes mean, on one thread and without a network."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or its import asks the network for a newer one
    try:
        found = metadata.version("albumentations")
        import albumentations
        import cv2
    except ImportError as error:
        raise UserError(
            f"augment.albumentations needs albumentations ({error}): {REMEDY}"
        ) from error
    if found != VERSION:
        raise UserError(
            f"augment.albumentations means albumentations {VERSION}, not {found}: {REMEDY}"
        )
    cv2.setNumThreads(0)
    return albumentations


def build(kinds: Mapping[str, Any], one: Mapping[str, Mapping[str, Any]]) -> Any:
    """The transform of checked names; UserError for arguments that it does not take."""
    ((name, given),) = one.items()
    kind, arguments = kinds[name], dict(given)
    known = [argument for argument in signature(kind.__init__).parameters if argument != "self"]
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"augment.albumentations: {name}.{argument}: unknown argument; {hint}")
    if name in GROUPS:
        arguments["transforms"] = [build(kinds, inner) for inner in arguments["transforms"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of arguments that it is going to ignore
        for harmless in ("ShiftScaleRotate is a special case of", "This augmenter is very slow"):
            warnings.filterwarnings("ignore", harmless)
        try:
            return kind(**arguments)
        except ZeroDivisionError as error:
            raise UserError(
                f"augment.albumentations: {name}: one of its transforms needs a p above 0"
            ) from error
        except Exception as error:
            problems = "; ".join(error_message(error)) or first_line(error)
            raise UserError(f"augment.albumentations: {name}: {problems}") from error


def error_message(error: Exception) -> Iterator[str]:
    """What the validator of albumentations says of each argument."""
    errors = getattr(error.__cause__, "errors", list)
    for problem in errors():
        place = ".".join(str(part) for part in problem["loc"])
        got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
        yield f"{place}: {problem['msg'].removeprefix('Value error, ')}{got}".lstrip(": ")


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
