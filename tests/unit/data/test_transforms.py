"""What a recipe can have done to a picture: drawn as it says, by row and view, and by nothing else."""

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
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.image_ops import BLEND_OPS, noise
from cifar_dist.data.augment.policies import (
    AUTO_RANGES,
    MAGNITUDES,
    OPERATIONS,
    WIDE_RANGES,
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

CPU = torch.device("cpu")
MANY = 50_000
CHANGES: dict[str, Any] = {
    "affine": Affine(degrees=15, translate=0.1, scale=(0.8, 1.2)),
    "color_jitter": ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "rand_augment": RandAugment(),
    "trivial_augment": TrivialAugment(),
    "erasing": Erasing(),
}
SINGLE: dict[str, dict[str, Any]] = {
    "vflip": {"vflip": True},
    **{name: {name: change} for name, change in CHANGES.items()},
    "one_of": {"one_of": OneOf(**CHANGES, p=0.9)},
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


def draws_of(rows: int = MANY) -> KeyedRandom:
    return KeyedRandom(what="augment", seed=0, view=0, rows=rows)


def drawn(change: Transform) -> Tensor:
    """The columns of many rows, all of them applied."""
    return change.draw(draws_of(), torch.ones(MANY, dtype=torch.bool))


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Within the ends, and by Kolmogorov and Smirnov's distance no further than one time in 10^5."""
    assert low <= values.min()
    assert values.max() <= high
    order = ((values.double().sort().values - low) / (high - low)).flatten()
    steps = torch.arange(len(order)).double() / len(order)
    assert (order - steps).abs().max() < 2.5 / math.sqrt(len(order))


# ----------------------------------------------------------------------------- keyed


@pytest.mark.parametrize("name", [*SINGLE, "all"])
def test_a_picture_does_not_depend_on_its_batch(split: Split, name: str) -> None:
    config = ALL if name == "all" else AugmentConfig(**SINGLE[name])
    rows = list(range(64))
    together = view(split, config, rows, epoch=3)
    assert together.dtype == torch.uint8
    assert not torch.equal(together, split.images)
    assert not torch.equal(together, view(split, config, rows, epoch=4))
    alone = torch.cat([view(split, config, [row], epoch=3) for row in rows])
    assert torch.equal(together, alone)
    shuffled = torch.randperm(64, generator=torch.manual_seed(0)).tolist()
    assert torch.equal(together[shuffled], view(split, config, shuffled, epoch=3))
    numbered = Augment(config, split, number=3)
    assert torch.equal(
        numbered(gather_batch(split, torch.arange(64), epoch=0, micro_batch=0)).images, together
    )


def test_precision_of_the_training_does_not_reach_the_picture(split: Split) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rounded = view(split, ALL, list(range(64)))
    assert torch.equal(rounded, view(split, ALL, list(range(64))))


def test_threads_do_not_reach_the_picture(split: Split) -> None:
    threads = torch.get_num_threads()
    pictures = []
    for count in (1, 3):
        torch.set_num_threads(count)
        pictures.append(view(split, ALL, list(range(64))))
    torch.set_num_threads(threads)
    assert torch.equal(*pictures)


def test_pictures_of_recipes_from_before_are_as_they_were() -> None:
    """Digests from before there was more than crop, flip, cutout and mixing."""
    images = (torch.arange(200 * 3072) * 7919 % 65521 % 256).to(torch.uint8)
    split = Split(images=images.view(200, 3, 32, 32), labels=torch.arange(200) % 100)
    for digest, config in {
        "a856719aeecadd3c": AugmentConfig(crop_padding=2, hflip=True),
        "5105a1709c8fb34e": AugmentConfig(crop_padding=4, hflip=True, cutout=8),
        "cbce79b6bf36a132": AugmentConfig(crop_padding=4, hflip=True, cutmix=1.0, seed=3),
    }.items():
        shown = [view(split, config, list(range(200)), epoch=epoch) for epoch in (0, 7)]
        content = torch.stack(shown).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest().startswith(digest), config


@pytest.mark.parametrize("name", SINGLE)
def test_a_change_moves_no_other_column(name: str) -> None:
    alone = draw_table(AugmentConfig(**SINGLE[name]), 0, num_images=200)
    among = draw_table(ALL, 0, num_images=200)
    plain = draw_table(AugmentConfig(crop_padding=4, hflip=True), 0, num_images=200)
    for column, other in zip(among[:5], plain[:5], strict=True):
        assert torch.equal(column, other)
    for column_name, column in alone.transforms.items():
        assert torch.equal(column, among.transforms[column_name])
    if name == "vflip":
        assert torch.equal(alone.vflip, among.vflip)
        assert not torch.equal(among.flip, among.vflip)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_applied_changes_no_bit(split: Split, name: str) -> None:
    change = CHANGES[name]
    some = torch.arange(64) % 2 == 0
    images = change(split.images, change.draw(draws_of(64), some))
    assert torch.equal(images[~some], split.images[~some])
    kept = (images[some] == split.images[some]).flatten(1).all(1)
    assert kept.sum() <= 12  # what a policy's identity and the like leave


@pytest.mark.parametrize("name", CHANGES)
def test_a_probability_is_the_share_of_pictures(name: str) -> None:
    kind = type(CHANGES[name])
    knobs = {field: value for field, value in vars(CHANGES[name]).items() if field != "p"}
    config = AugmentConfig(**{name: kind(**knobs, p=0.3)})
    column = draw_table(config, 0, num_images=MANY).transforms[name]
    never = torch.zeros(MANY, dtype=torch.bool)
    nothing = kind(**knobs).draw(draws_of().scoped(name), never)
    always = draw_table(AugmentConfig(**{name: kind(**knobs)}), 0, num_images=MANY)
    differs = (always.transforms[name] != nothing).flatten(1)
    keeps = (differs & (column == nothing).flatten(1)).any(1)
    share = 1 - float(keeps.double().sum() / differs.any(1).double().sum())
    assert share == pytest.approx(0.3, abs=0.01)


# ----------------------------------------------------------------------------- drawn


def test_affine_is_drawn_and_applied_as_torchvisions(split: Split) -> None:
    affine = Affine(degrees=20, translate=0.25, scale=(0.5, 2.0))
    back = drawn(affine).double()
    linear = back.view(-1, 2, 3)[:, :, :2].inverse()
    scale = linear.det().sqrt()
    assert_uniform(scale, 0.5 - 1e-6, 2.0 + 1e-6)
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    assert_uniform(angle, -20.001, 20.001)
    shift = -(linear @ back.view(-1, 2, 3)[:, :, 2:]).flatten(1)
    assert_uniform(shift[:, 0], -8.001, 8.001)
    assert_uniform(shift[:, 1], -8.001, 8.001)
    assert (torch.corrcoef(torch.stack([scale, angle, *shift.T])) - torch.eye(4)).abs().max() < 0.02
    shown = affine(split.images, back[:64].float())
    for row in range(64):
        theirs = vision.affine(
            split.images[row],
            angle=angle[row].item(),
            translate=shift[row].tolist(),
            scale=scale[row].item(),
            shear=[0.0, 0.0],
            interpolation=vision.InterpolationMode.BILINEAR,
        )
        assert (shown[row].int() - theirs.int()).abs().max() <= 1


def test_color_jitter_is_drawn_and_applied_as_torchvisions(split: Split) -> None:
    """In our order; three roundings and a half, each by a level, each up to 1.4 times magnified."""
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.3, hue=0.1)
    columns = drawn(jitter)
    ends = [(0.6, 1.4), (0.0, 2.5), (0.7, 1.3), (-0.1, 0.1)]
    for column, (low, high) in zip(columns.unbind(1), ends, strict=True):
        assert_uniform(column, low, high + 1e-6)
    assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 0.02
    shown = jitter(split.images, columns[:64])
    for row, factors in enumerate(columns[:64].tolist()):
        picture = vision.to_pil_image(split.images[row])
        picture = vision.adjust_brightness(picture, factors[0])
        picture = vision.adjust_contrast(picture, factors[1])
        picture = vision.adjust_saturation(picture, factors[2])
        theirs = vision.adjust_hue(vision.pil_to_tensor(picture), factors[3])
        assert (shown[row].int() - theirs.int()).abs().max() <= 1


def test_erasing_is_drawn_as_torchvisions() -> None:
    """Sizes against 5,000 draws of its RandomErasing, places against a uniform choice."""
    erasing = Erasing(area=(0.02, 0.6), ratio=(0.3, 3.3))
    top, bottom, left, right, seed = drawn(erasing).unbind(1)
    height, width = bottom - top, right - left
    assert height.min() > 0
    assert top.min() == left.min() == 0
    assert bottom.max() == right.max() == 32
    low = height * width >= 0.015 * 1024  # sides are rounded
    assert low.all()
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1.0, scale=(0.02, 0.6), ratio=(0.3, 3.3))
    blank = [torch.zeros(3, 32, 32)]
    sizes = [(made["h"], made["w"]) for made in (theirs.make_params(blank) for _ in range(5_000))]
    for ours, other in zip((height, width), torch.tensor(sizes).T, strict=True):
        ranks = torch.arange(1, 32)[:, None]
        difference = (ours <= ranks).double().mean(1) - (other <= ranks).double().mean(1)
        assert difference.abs().max() < 0.03
    for start, size in ((top, height), (left, width)):
        assert_uniform((start[size == 10] + torch.rand(int((size == 10).sum()))), 0, 23)
    assert_uniform(seed, 0, 2**31)


def test_erasing_fills_with_noise_or_the_mean(split: Split) -> None:
    column = Erasing().draw(draws_of(64), torch.ones(64, dtype=torch.bool))
    noisy, even = Erasing()(split.images, column), Erasing(fill="mean")(split.images, column)
    for row, (top, bottom, left, right, seed) in enumerate(column.tolist()):
        inside = (slice(None), slice(top, bottom), slice(left, right))
        own = noise(torch.tensor([seed]))[0]
        assert torch.equal(noisy[row][inside], own[inside])
        assert even[row][inside].flatten(1).float().std(1).max() == 0
        outside = torch.ones(3, 32, 32, dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(noisy[row][outside], split.images[row][outside])
        assert torch.equal(even[row][outside], split.images[row][outside])


def test_where_no_drawn_box_fits_nothing_is_erased() -> None:
    column = drawn(Erasing(area=(0.96, 1.0)))
    whole = column[:, 0] == column[:, 1]
    assert torch.equal(whole, column[:, 2] == column[:, 3])
    assert 0.5 < whole.double().mean() < 1


# ----------------------------------------------------------------------------- one of


def test_a_group_applies_one_member_at_most() -> None:
    group = OneOf(
        affine=Affine(degrees=15, p=0.5),
        color_jitter=ColorJitter(brightness=0.4),
        erasing=Erasing(),
        p=0.8,
    )
    columns = group.draw(draws_of())
    assert list(columns) == ["affine", "color_jitter", "erasing"]
    none = torch.zeros(MANY, dtype=torch.bool)
    applied = torch.stack(
        [
            (columns["affine"] != Affine().draw(draws_of(), none)).any(1),
            (columns["color_jitter"] != ColorJitter().draw(draws_of(), none)).any(1),
            columns["erasing"][:, 0] != columns["erasing"][:, 1],
        ]
    )
    assert applied.sum(0).max() == 1
    shares = applied.double().mean(1)
    expected = torch.tensor([0.8 * weight / 2.5 for weight in (0.5, 1.0, 1.0)]).double()
    assert torch.allclose(shares, expected, atol=0.01)


def test_a_group_shows_what_its_chosen_member_makes(split: Split) -> None:
    rows = list(range(64))
    config = AugmentConfig(one_of=OneOf(color_jitter=ColorJitter(hue=0.5), erasing=Erasing()))
    shown = view(split, config, rows)
    table = draw_table(config, 0, num_images=64).transforms
    jittered = ColorJitter(hue=0.5)(split.images, table["one_of.color_jitter"])
    erased = Erasing()(split.images, table["one_of.erasing"])
    is_erased = table["one_of.erasing"][:, 0] != table["one_of.erasing"][:, 1]
    assert 10 < is_erased.sum() < 54
    assert torch.equal(shown, torch.where(is_erased[:, None, None, None], erased, jittered))


def test_the_order_is_that_of_the_names() -> None:
    assert list(ALL.transforms) == [
        *("affine", "color_jitter", "rand_augment", "trivial_augment"),
        *(f"one_of.{name}" for name in CHANGES),
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
def test_operations_are_torchvisions(
    split: Split, name: str, ranges: Ranges, space: dict[str, Any]
) -> None:
    """At each magnitude, both signs: on Pillow's pictures for colours, on tensors for warps.

    Magnitudes are compared with theirs, f32 noise aside; then theirs gets ours.
    """
    pictures, number = split.images[:31], OPERATIONS.index(name)
    magnitudes, has_sign = space[THEIR_NAMES[name]]
    values = magnitudes(MAGNITUDES + 1, 32, 32)
    in_pillow = number > OPERATIONS.index("rotate")
    for sign in (1, -1):
        strength = torch.arange(31)
        columns = encode_ops(
            ranges, torch.full_like(strength, number), strength, torch.full_like(strength, sign)
        )
        ours = apply_operation(pictures, columns)
        for row, picture in enumerate(pictures):
            value = 0.0 if values is None else float(values[row]) * (sign if has_sign else 1)
            factor, level = columns[row, 7].item(), columns[row, 9].item()
            if name in BLEND_OPS:
                assert factor == pytest.approx(1 + value, abs=1e-6)
                value = factor - 1
            if name == "solarize":
                assert level == pytest.approx(255 * value, abs=1e-4)
                value = (level - 1e-9) / 255
            if name.startswith("translate"):
                value += math.copysign(1e-5, value)  # 15.999999 of them is 16
            theirs = v2.RandAugment()._apply_image_or_video_transform(
                vision.to_pil_image(picture) if in_pillow else picture,
                THEIR_NAMES[name],
                value,
                interpolation=vision.InterpolationMode.NEAREST,
                fill={},
            )
            other = vision.pil_to_tensor(theirs) if in_pillow else theirs
            different = (ours[row].int() - other.int()).abs()
            case = (name, row, sign, int(different.max()))
            if name in ("shear_x", "shear_y", "rotate"):  # another pixel where two are equally near
                assert different.count_nonzero() <= 0.02 * different.numel(), case
            else:
                assert different.max() <= (name == "autocontrast"), case


@pytest.mark.parametrize(
    ("policy", "steps"), [(RandAugment(num_ops=3, magnitude=9), 3), (TrivialAugment(), 1)]
)
def test_policies_draw_operations_evenly(policy: RandAugment | TrivialAugment, steps: int) -> None:
    columns = drawn(policy)
    assert columns.shape == (MANY, steps, 10)
    blends, look_ups = columns[..., 6].long(), columns[..., 8].long()
    for kinds in (blends, look_ups):
        counts = kinds.flatten().bincount(minlength=5).double()[1:] / kinds.numel()
        assert (counts - 1 / 14).abs().max() < 0.006
    identity = columns.new_tensor([1, 0, 0, 0, 1, 0])
    warped = (columns[..., :6] != identity).any(-1)
    share = 5 / 14 if steps == 3 else (5 - 3 / 31 - 2 * 1 / 31) / 14  # a strength of 0 is no warp
    assert float(warped.double().mean()) == pytest.approx(share, abs=0.01)
    assert int(((blends > 0).int() + (look_ups > 0) + warped).max()) == 1
    if steps == 1:  # strengths: solarize's levels are 255 ... 0 in 31 steps
        levels = columns[..., 9][look_ups == 2]
        counts = (levels / 8.5).round().long().bincount(minlength=31).double() / len(levels)
        assert (counts - 1 / 31).abs().max() < 0.012
    else:  # one magnitude, both signs
        shear = columns[..., 1][(columns[..., 0] == 1) & (columns[..., 1] != 0)]
        assert shear.abs().unique().tolist() == pytest.approx([0.09])
        assert float(shear.sign().mean()) == pytest.approx(0, abs=0.06)
        assert (operations_agree(columns[:, 0], columns[:, 1]) - 1 / 14) < 0.01


def operations_agree(one: Tensor, other: Tensor) -> float:
    """How often two steps do the same kind of blend or look-up, of the pictures that one does it to."""
    kinds, others = (column[:, 6] + 10 * column[:, 8] for column in (one, other))
    return float((kinds == others)[kinds > 0].double().mean())


# ----------------------------------------------------------------------------- in a recipe


def augment_of(**augment: Any) -> AugmentConfig:
    return validate({"name": "a", "augment": augment}, where="here").augment


def test_a_recipe_names_them() -> None:
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
    named = asdict(config)  # what a cache of logits was made of
    assert named["one_of"]["erasing"]["fill"] == "mean"


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"affine": {"degres": 3}}, r"did you mean augment\.affine\.degrees"),
        ({"affine": {"degrees": 200}}, r"augment\.affine\.degrees"),
        ({"affine": {"scale": [1.2, 0.8]}}, "lower end first"),
        ({"color_jitter": {"hue": 0.6}}, r"color_jitter\.hue"),
        ({"erasing": {"area": [0.1, 2.0]}}, r"erasing\.area"),
        ({"rand_augment": {"magnitude": 31}}, r"rand_augment\.magnitude"),
        ({"one_of": {"affine": {}}}, "at least two"),
        ({"one_of": {"afine": {}}}, r"did you mean augment\.one_of\.affine"),
    ],
)
def test_mistakes_are_named(augment: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        augment_of(**augment)


@pytest.mark.parametrize("name", SINGLE)
def test_all_views_of_a_change_cannot_be_counted(name: str) -> None:
    with pytest.raises(ValueError, match=f"remove {name}, or give a number of views"):
        AugmentConfig(crop_padding=4, views="all", **SINGLE[name])
