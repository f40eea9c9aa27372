"""Image transforms: distributions of their parameters, independence of the batch, other libraries."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.autoaugment import (  # type: ignore[import-untyped]
    AutoAugmentPolicy,
)
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import BLEND_OPS, LUT_OPS, noise
from cifar_dist.data.augment.policies import (
    AUTO_POLICY,
    AUTO_RANGES,
    MAGNITUDES,
    OPERATIONS,
    WIDE_RANGES,
    AutoAugment,
    RandAugment,
    Ranges,
    TrivialAugment,
    apply_operation,
    encode_ops,
)
from cifar_dist.data.augment.tables import draw_table
from cifar_dist.data.augment.transforms import Affine, ColorJitter, Erasing, OneOf, Transform
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.recipe.load import validate
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.random import KeyedRandom

NUM_ROWS = 50_000
TRANSFORMS: dict[str, Any] = {
    "affine": Affine(degrees=15, translate=0.1, scale=(0.8, 1.2)),
    "color_jitter": ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "auto_augment": AutoAugment(),
    "rand_augment": RandAugment(),
    "trivial_augment": TrivialAugment(),
    "erasing": Erasing(),
}
SINGLE: dict[str, dict[str, Any]] = {
    "vflip": {"vflip": True},
    **{name: {name: transform} for name, transform in TRANSFORMS.items()},
    "one_of": {"one_of": OneOf(**TRANSFORMS, p=0.9)},
}
ALL = AugmentConfig(
    crop_padding=4,
    hflip=True,
    cutout=8,
    **{k: v for one in SINGLE.values() for k, v in one.items()},
)


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def view(split: Split, config: AugmentConfig, rows: list[int], *, epoch: int = 0) -> Tensor:
    batch = gather_batch(split, torch.tensor(rows), epoch=epoch, micro_batch=0)
    return Augment(config, split)(batch).images


def random_columns(rows: int = NUM_ROWS) -> KeyedRandom:
    return KeyedRandom(purpose="augment", seed=0, view=0, rows=rows)


def draw(transform: Transform) -> Tensor:
    """Return the parameters of many rows to which the transform is applied."""
    return transform.draw(random_columns(), torch.ones(NUM_ROWS, dtype=torch.bool), 32)


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Check the range and the Kolmogorov-Smirnov distance, at a false alarm rate of 10^-5."""
    assert low <= values.min()
    assert values.max() <= high
    order = ((values.double().sort().values - low) / (high - low)).flatten()
    steps = torch.arange(len(order)).double() / len(order)
    assert (order - steps).abs().max() < 2.5 / math.sqrt(len(order))


# ----------------------------------------------------------------------------- keys


@pytest.mark.parametrize("name", [*SINGLE, "all"])
def test_image_does_not_depend_on_its_batch(split: Split, name: str) -> None:
    config = ALL if name == "all" else AugmentConfig(**SINGLE[name])
    rows = list(range(64))
    batch = view(split, config, rows, epoch=3)
    assert batch.dtype == torch.uint8
    assert not torch.equal(batch, split.images)
    assert not torch.equal(batch, view(split, config, rows, epoch=4))
    single = torch.cat([view(split, config, [row], epoch=3) for row in rows])
    assert torch.equal(batch, single)
    shuffled = torch.randperm(64, generator=torch.manual_seed(0)).tolist()
    assert torch.equal(batch[shuffled], view(split, config, shuffled, epoch=3))
    fixed = Augment(config, split, view_id=3)
    assert torch.equal(
        fixed(gather_batch(split, torch.arange(64), epoch=0, micro_batch=0)).images, batch
    )


def test_image_does_not_depend_on_autocast(split: Split) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        images = view(split, ALL, list(range(64)))
    assert torch.equal(images, view(split, ALL, list(range(64))))


def test_image_does_not_depend_on_the_number_of_threads(split: Split) -> None:
    threads = torch.get_num_threads()
    images = []
    for count in (1, 3):
        torch.set_num_threads(count)
        images.append(view(split, ALL, list(range(64))))
    torch.set_num_threads(threads)
    assert torch.equal(*images)


def test_images_of_older_recipes_have_not_changed() -> None:
    """The digests date from when crop, flip, cutout and mixing were the only transforms."""
    images = (torch.arange(200 * 3072) * 7919 % 65521 % 256).to(torch.uint8)
    split = Split(images=images.view(200, 3, 32, 32), labels=torch.arange(200) % 100)
    for digest, config in {
        "a856719aeecadd3c": AugmentConfig(crop_padding=2, hflip=True),
        "5105a1709c8fb34e": AugmentConfig(crop_padding=4, hflip=True, cutout=8),
        "cbce79b6bf36a132": AugmentConfig(crop_padding=4, hflip=True, cutmix=1.0, seed=3),
    }.items():
        views = [view(split, config, list(range(200)), epoch=epoch) for epoch in (0, 7)]
        content = torch.stack(views).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest().startswith(digest), config


@pytest.mark.parametrize("name", SINGLE)
def test_transforms_do_not_change_the_parameters_of_others(name: str) -> None:
    single = draw_table(AugmentConfig(**SINGLE[name]), 0, num_images=200, image_size=32)
    combined = draw_table(ALL, 0, num_images=200, image_size=32)
    plain = draw_table(AugmentConfig(crop_padding=4, hflip=True), 0, num_images=200, image_size=32)
    for column, other in zip(combined[:5], plain[:5], strict=True):
        assert torch.equal(column, other)
    for column_name, column in single.transforms.items():
        assert torch.equal(column, combined.transforms[column_name])
    if name == "vflip":
        assert torch.equal(single.vflip, combined.vflip)
        assert not torch.equal(combined.flip, combined.vflip)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_rows_that_are_not_applied_stay_unchanged(split: Split, name: str) -> None:
    transform = TRANSFORMS[name]
    applied = torch.arange(64) % 2 == 0
    images = transform(split.images, transform.draw(random_columns(64), applied, 32))
    assert torch.equal(images[~applied], split.images[~applied])
    unchanged = (images[applied] == split.images[applied]).flatten(1).all(1)
    assert unchanged.sum() <= 12  # by the identity operation and the like


@pytest.mark.parametrize("name", TRANSFORMS)
def test_p_is_the_share_of_images_to_which_a_transform_is_applied(name: str) -> None:
    cls = type(TRANSFORMS[name])
    options = {field: value for field, value in vars(TRANSFORMS[name]).items() if field != "p"}
    config = AugmentConfig(**{name: cls(**options, p=0.3)})
    column = draw_table(config, 0, num_images=NUM_ROWS, image_size=32).transforms[name]
    never = torch.zeros(NUM_ROWS, dtype=torch.bool)
    identity = cls(**options).draw(random_columns().scoped(name), never, 32)
    always = draw_table(
        AugmentConfig(**{name: cls(**options)}), 0, num_images=NUM_ROWS, image_size=32
    )
    differs = (always.transforms[name] != identity).flatten(1)
    skipped = (differs & (column == identity).flatten(1)).any(1)
    share = 1 - float(skipped.double().sum() / differs.any(1).double().sum())
    assert share == pytest.approx(0.3, abs=0.01)


# ----------------------------------------------------------------------------- parameters


def test_affine_matches_torchvision(split: Split) -> None:
    affine = Affine(degrees=20, translate=0.25, scale=(0.5, 2.0))
    inverse = draw(affine).double()
    linear = inverse.view(-1, 2, 3)[:, :, :2].inverse()
    scale = linear.det().sqrt()
    assert_uniform(scale, 0.5 - 1e-6, 2.0 + 1e-6)
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    assert_uniform(angle, -20.001, 20.001)
    shift = -(linear @ inverse.view(-1, 2, 3)[:, :, 2:]).flatten(1)
    assert_uniform(shift[:, 0], -8.001, 8.001)
    assert_uniform(shift[:, 1], -8.001, 8.001)
    assert (torch.corrcoef(torch.stack([scale, angle, *shift.T])) - torch.eye(4)).abs().max() < 0.02
    ours = affine(split.images, inverse[:64].float())
    for row in range(64):
        theirs = vision.affine(
            split.images[row],
            angle=angle[row].item(),
            translate=shift[row].tolist(),
            scale=scale[row].item(),
            shear=[0.0, 0.0],
            interpolation=vision.InterpolationMode.BILINEAR,
        )
        assert (ours[row].int() - theirs.int()).abs().max() <= 1


def test_color_jitter_matches_torchvision(split: Split) -> None:
    """Apply torchvision's adjustments in the same order to PIL images."""
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.3, hue=0.1)
    columns = draw(jitter)
    ends = [(0.6, 1.4), (0.0, 2.5), (0.7, 1.3), (-0.1, 0.1)]
    for column, (low, high) in zip(columns.unbind(1), ends, strict=True):
        assert_uniform(column, low, high + 1e-6)
    assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 0.02
    ours = jitter(split.images, columns[:64])
    for row, factors in enumerate(columns[:64].tolist()):
        image = vision.to_pil_image(split.images[row])
        image = vision.adjust_brightness(image, factors[0])
        image = vision.adjust_contrast(image, factors[1])
        image = vision.adjust_saturation(image, factors[2])
        theirs = vision.adjust_hue(vision.pil_to_tensor(image), factors[3])
        assert (ours[row].int() - theirs.int()).abs().max() <= 1


def test_erasing_boxes_match_torchvision() -> None:
    """Compare sizes with 5,000 boxes of its RandomErasing, and positions with a uniform choice."""
    erasing = Erasing(area=(0.02, 0.6), ratio=(0.3, 3.3))
    top, bottom, left, right, seed = draw(erasing).unbind(1)
    height, width = bottom - top, right - left
    assert height.min() > 0
    assert top.min() == left.min() == 0
    assert bottom.max() == right.max() == 32
    assert (height * width >= 0.015 * 1024).all()  # sides are rounded
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1.0, scale=(0.02, 0.6), ratio=(0.3, 3.3))
    blank = [torch.zeros(3, 32, 32)]
    params = (theirs.make_params(blank) for _ in range(5_000))
    sizes = torch.tensor([(box["h"], box["w"]) for box in params])
    for ours, other in zip((height, width), sizes.T, strict=True):
        limits = torch.arange(1, 32)[:, None]
        difference = (ours <= limits).double().mean(1) - (other <= limits).double().mean(1)
        assert difference.abs().max() < 0.03
    for start, size in ((top, height), (left, width)):
        assert_uniform((start[size == 10] + torch.rand(int((size == 10).sum()))), 0, 23)
    assert_uniform(seed, 0, 2**31)


def test_erasing_fills_with_noise_or_the_mean(split: Split) -> None:
    column = Erasing().draw(random_columns(64), torch.ones(64, dtype=torch.bool), 32)
    noisy, mean = Erasing()(split.images, column), Erasing(fill="mean")(split.images, column)
    for row, (top, bottom, left, right, seed) in enumerate(column.tolist()):
        inside = (slice(None), slice(top, bottom), slice(left, right))
        expected = noise(torch.tensor([seed]), 32)[0]
        assert torch.equal(noisy[row][inside], expected[inside])
        assert mean[row][inside].flatten(1).float().std(1).max() == 0
        outside = torch.ones(3, 32, 32, dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(noisy[row][outside], split.images[row][outside])
        assert torch.equal(mean[row][outside], split.images[row][outside])


def test_erasing_does_nothing_if_no_box_fits() -> None:
    column = draw(Erasing(area=(0.96, 1.0)))
    is_empty = column[:, 0] == column[:, 1]
    assert torch.equal(is_empty, column[:, 2] == column[:, 3])
    assert 0.5 < is_empty.double().mean() < 1


# ----------------------------------------------------------------------------- one of


def test_one_of_applies_at_most_one_member_in_proportion_to_p() -> None:
    group = OneOf(
        affine=Affine(degrees=15, p=0.5),
        color_jitter=ColorJitter(brightness=0.4),
        erasing=Erasing(),
        p=0.8,
    )
    columns = group.draw(random_columns(), 32)
    assert list(columns) == ["affine", "color_jitter", "erasing"]
    none = torch.zeros(NUM_ROWS, dtype=torch.bool)
    applied = torch.stack(
        [
            (columns["affine"] != Affine().draw(random_columns(), none, 32)).any(1),
            (columns["color_jitter"] != ColorJitter().draw(random_columns(), none, 32)).any(1),
            columns["erasing"][:, 0] != columns["erasing"][:, 1],
        ]
    )
    assert applied.sum(0).max() == 1
    shares = applied.double().mean(1)
    expected = torch.tensor([0.8 * weight / 2.5 for weight in (0.5, 1.0, 1.0)]).double()
    assert torch.allclose(shares, expected, atol=0.01)


def test_one_of_gives_the_image_of_the_chosen_member(split: Split) -> None:
    rows = list(range(64))
    config = AugmentConfig(one_of=OneOf(color_jitter=ColorJitter(hue=0.5), erasing=Erasing()))
    images = view(split, config, rows)
    table = draw_table(config, 0, num_images=64, image_size=32).transforms
    jittered = ColorJitter(hue=0.5)(split.images, table["one_of.color_jitter"])
    erased = Erasing()(split.images, table["one_of.erasing"])
    is_erased = table["one_of.erasing"][:, 0] != table["one_of.erasing"][:, 1]
    assert 10 < is_erased.sum() < 54
    assert torch.equal(images, torch.where(is_erased[:, None, None, None], erased, jittered))


def test_transforms_are_applied_in_the_documented_order() -> None:
    assert list(ALL.transforms) == [
        *("affine", "color_jitter", "auto_augment", "rand_augment", "trivial_augment"),
        *(f"one_of.{name}" for name in TRANSFORMS),
        "erasing",
    ]


# ----------------------------------------------------------------------------- policies

WIDE = v2.TrivialAugmentWide()._AUGMENTATION_SPACE
AUTO = v2.RandAugment()._AUGMENTATION_SPACE
THEIR_NAMES = dict(
    zip(
        OPERATIONS,
        (
            *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
            *(
                "Contrast",
                "Color",
                "Sharpness",
                "Posterize",
                "Solarize",
                "AutoContrast",
                "Equalize",
            ),
        ),
        strict=True,
    )
)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("ranges", "space"), [(AUTO_RANGES, AUTO), (WIDE_RANGES, WIDE)])
def test_operations_match_torchvision(
    split: Split, name: str, ranges: Ranges, space: dict[str, Any]
) -> None:
    """Compare each magnitude and sign, on PIL images for colors and on tensors for warps.

    The strengths must agree up to f32 rounding; torchvision then applies the exact same strength.
    """
    images, index = split.images[:31], OPERATIONS.index(name)
    magnitudes, has_sign = space[THEIR_NAMES[name]]
    values = magnitudes(MAGNITUDES + 1, 32, 32)
    with_pillow = index > OPERATIONS.index("rotate")
    for sign in (1, -1):
        magnitude = torch.arange(31)
        columns = encode_ops(
            ranges,
            torch.full_like(magnitude, index),
            magnitude,
            torch.full_like(magnitude, sign),
            image_size=32,
        )
        ours = apply_operation(images, columns)
        for row, image in enumerate(images):
            value = 0.0 if values is None else float(values[row]) * (sign if has_sign else 1)
            factor, level = columns[row, 7].item(), columns[row, 9].item()
            if name in BLEND_OPS:
                assert factor == pytest.approx(1 + value, abs=1e-6)
                value = factor - 1
            if name == "solarize":
                assert level == pytest.approx(255 * value, abs=1e-4)
                value = (level - 1e-9) / 255
            if name.startswith("translate"):
                value += math.copysign(1e-5, value)  # they have 15.999999 instead of 16
            theirs = v2.RandAugment()._apply_image_or_video_transform(
                vision.to_pil_image(image) if with_pillow else image,
                THEIR_NAMES[name],
                value,
                interpolation=vision.InterpolationMode.NEAREST,
                fill={},
            )
            other = vision.pil_to_tensor(theirs) if with_pillow else theirs
            different = (ours[row].int() - other.int()).abs()
            case = (name, row, sign, int(different.max()))
            if name in ("shear_x", "shear_y", "rotate"):  # two pixels can be equally near
                assert different.count_nonzero() <= 0.02 * different.numel(), case
            else:
                assert different.max() <= (name == "autocontrast"), case


@pytest.mark.parametrize(
    ("policy", "steps"), [(RandAugment(num_ops=3, magnitude=9), 3), (TrivialAugment(), 1)]
)
def test_policies_draw_operations_uniformly(
    policy: RandAugment | TrivialAugment, steps: int
) -> None:
    columns = draw(policy)
    assert columns.shape == (NUM_ROWS, steps, 10)
    blends, lookups = columns[..., 6].long(), columns[..., 8].long()
    for kinds in (blends, lookups):
        counts = kinds.flatten().bincount(minlength=5).double()[1:] / kinds.numel()
        assert (counts - 1 / 14).abs().max() < 0.006
    identity = columns.new_tensor([1, 0, 0, 0, 1, 0])
    warped = (columns[..., :6] != identity).any(-1)
    share = 5 / 14 if steps == 3 else (5 - 3 / 31 - 2 * 1 / 31) / 14  # magnitude 0 does not warp
    assert float(warped.double().mean()) == pytest.approx(share, abs=0.01)
    assert int(((blends > 0).int() + (lookups > 0) + warped).max()) == 1
    if steps == 1:  # magnitudes are uniform: solarize's levels are 255 ... 0 in 31 steps
        levels = columns[..., 9][lookups == 2]
        counts = (levels / 8.5).round().long().bincount(minlength=31).double() / len(levels)
        assert (counts - 1 / 31).abs().max() < 0.012
    else:  # one magnitude, both signs
        shear = columns[..., 1][(columns[..., 0] == 1) & (columns[..., 1] != 0)]
        assert shear.abs().unique().tolist() == pytest.approx([0.09])
        assert float(shear.sign().mean()) == pytest.approx(0, abs=0.06)
        assert agreement(columns[:, 0], columns[:, 1]) == pytest.approx(1 / 14, abs=0.01)


def agreement(one: Tensor, other: Tensor) -> float:
    """Return how often step `other` repeats the blend or lookup of step `one`."""
    kinds, others = (column[:, 6] + 10 * column[:, 8] for column in (one, other))
    return float((kinds == others)[kinds > 0].double().mean())


# ----------------------------------------------------------------------------- recipes


def augment_of(**augment: Any) -> AugmentConfig:
    return validate({"name": "a", "augment": augment}, where="here").augment


def test_recipe_sections_become_transforms() -> None:
    config = augment_of(
        affine={"degrees": 15, "scale": [0.9, 1.1]},
        rand_augment={},
        one_of={"color_jitter": {"hue": 0.1}, "erasing": {"fill": "mean"}, "p": 0.5},
    )
    assert config.affine == Affine(degrees=15, scale=(0.9, 1.1))
    assert config.rand_augment == RandAugment(num_ops=2, magnitude=9)
    assert config.one_of == OneOf(
        color_jitter=ColorJitter(hue=0.1), erasing=Erasing(fill="mean"), p=0.5
    )
    fields = asdict(config)  # part of the fingerprint of a logit cache
    assert fields["one_of"]["erasing"]["fill"] == "mean"


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"affine": {"degres": 3}}, r"did you mean augment\.affine\.degrees"),
        ({"affine": {"degrees": 200}}, r"augment\.affine\.degrees"),
        ({"affine": {"scale": [1.2, 0.8]}}, "lower end must come first"),
        ({"color_jitter": {"hue": 0.6}}, r"color_jitter\.hue"),
        ({"erasing": {"area": [0.1, 2.0]}}, r"erasing\.area"),
        ({"rand_augment": {"magnitude": 31}}, r"rand_augment\.magnitude"),
        ({"one_of": {"affine": {}}}, "at least two"),
        ({"one_of": {"afine": {}}}, r"did you mean augment\.one_of\.affine"),
    ],
)
def test_errors_name_the_key(augment: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        augment_of(**augment)


@pytest.mark.parametrize("name", SINGLE)
def test_all_views_refuses_other_transforms(name: str) -> None:
    with pytest.raises(ValueError, match=f"remove {name}, or give a number of views"):
        AugmentConfig(crop_padding=4, views="all", **SINGLE[name])


def test_auto_augment_has_the_published_policy() -> None:
    """torchvision's policy has inversions, which are solarizations with threshold 0 here."""
    theirs = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._get_policies(AutoAugmentPolicy.CIFAR10)
    for pair, their_pair in zip(AUTO_POLICY, theirs, strict=True):
        for (name, p, magnitude), (their_name, their_p, their_magnitude) in zip(
            pair, their_pair, strict=True
        ):
            if their_name == "Invert":
                their_name, their_magnitude = "Solarize", 9
            assert (THEIR_NAMES[name], p) == (their_name, their_p)
            assert their_magnitude in (magnitude, None)


def test_auto_augment_has_the_published_strengths() -> None:
    """Each operation of the policy at its magnitude, out of ten from 0 to the highest one."""
    space = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._AUGMENTATION_SPACE
    column = AutoAugment().draw(random_columns(), torch.ones(NUM_ROWS, dtype=torch.bool), 32)
    for name in ("rotate", "shear_y", "contrast", "posterize", "solarize", "translate_x"):
        magnitudes = {m for pair in AUTO_POLICY for other, p, m in pair if other == name and p}
        values, has_sign = space[THEIR_NAMES[name]]
        unit = 255 if name == "solarize" else 1
        expected = {round(unit * float(values(10, 32, 32)[m]), 2) for m in magnitudes}
        sine, shear, shift = (column[..., index].flatten().double() for index in (3, 3, 2))
        is_turned = (column[..., 0] != 1).flatten()
        match name:
            case "rotate":
                found = sine[is_turned].asin().rad2deg().abs()
            case "shear_y":
                found = shear[~is_turned & (shear != 0)].abs()
            case "translate_x":
                found = shift[~is_turned & (shift != 0)].abs()
                expected = {float(int(value + 1e-5)) for value in expected}
            case "contrast":
                found = (column[..., 7][column[..., 6] == BLEND_OPS.index(name)] - 1).abs()
            case _:
                found = column[..., 9][column[..., 8] == LUT_OPS.index(name)]
        assert {round(value, 2) for value in found.unique().tolist()} == expected, name
        assert has_sign == (name not in ("posterize", "solarize"))


def test_auto_augment_draws_sub_policies_and_operations_with_their_probabilities() -> None:
    column = AutoAugment().draw(random_columns(), torch.ones(NUM_ROWS, dtype=torch.bool), 32)
    for step in range(2):
        used = column[:, step, 8].long()  # lookup tables
        for kind, name in enumerate(LUT_OPS[1:], start=1):
            expected = sum(
                p for pair in AUTO_POLICY for n, p, _ in pair[step : step + 1] if n == name
            )
            share = (used == kind).double().mean().item()
            assert share == pytest.approx(expected / len(AUTO_POLICY), abs=0.01), (step, name)
    assert 0.4 < (column[..., 7] > 1).sum() / (column[..., 7] != 1).sum() < 0.6  # signs
