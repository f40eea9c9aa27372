"""data.place: host: pictures come from the file's pages, ahead of the step, and no bit is another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from launcher import Ranks, train
from restarts import EVERY_STEP, wait_for_step
from step_cost import ALL_OPS, CROP_FLIP, GPU, PRETENDED, Waits
from streams import ROWS, plan, shown
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch, eval_blocks
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.streaming import StreamedImages, rows_in_order, stream_images
from cifar_dist.recipe.load import load_recipe
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, TeacherMaker, taught

MIXED = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.2, cutmix=1.0)
CONFIGS = {
    "plain": AugmentConfig(),
    "crop and flip": CROP_FLIP,
    "mixed": MIXED,
    "two copies": replace(MIXED, repeated=2),
}
INLINE = AugmentConfig(albumentations=({"GaussNoise": {"p": 1.0}},), workers=0, crop_padding=2)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pictures")]


@pytest.fixture
def on_host(data: Path) -> Split:
    return load_split(data, "train", place="host")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "keys",
    [{}, {"shuffle": False}, {"start_step": 9, "rank": 1, "world_size": 2}],
    ids=["one process", "in order", "the second of two, later"],
)
def test_a_view_is_the_same(
    data: Path, on_host: Split, config: AugmentConfig, keys: dict[str, Any]
) -> None:
    """Over two ends of an epoch, partners, copies and labels included."""

    def batches_of(split: Split) -> Iterator[list[Batch]]:
        return plan(split, repeated=config.repeated, **keys)

    split = load_split(data, "train")
    expected = shown(Augment(config, split, ROWS), batches_of(split))
    with stream_images(config, on_host, ROWS, batches_of) as pictures:
        assert pictures is not None
        found = shown(Augment(config, on_host, ROWS, host=pictures), batches_of(on_host))
    assert len(found) == len(expected) >= 12
    for one, other in zip(found, expected, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, tensor in vars(one).items():
            assert tensor is vars(other)[name] or torch.equal(tensor, vars(other)[name]), name


def test_what_is_not_ahead_is_fetched_when_asked(data: Path, on_host: Split) -> None:
    """An evaluation's blocks, another look at an epoch, numbered views, a pipeline on the host."""
    split, rows = load_split(data, "train"), torch.arange(64)
    for one, other in zip(
        *(
            eval_blocks(place, rows, block_size=25, rank=0, world_size=1)
            for place in (split, on_host)
        ),
        strict=True,
    ):
        assert torch.equal(one.images, other.images)
    for config in (*CONFIGS.values(), INLINE):
        augments = [Augment(config, place, ROWS) for place in (split, on_host)]
        for again in (None, 1):
            views = [
                shown(augment.clone(number=again), plan(augment.split), steps=1)
                for augment in augments
            ]
            assert all(torch.equal(a.images, b.images) for a, b in zip(*views, strict=True))


class Largest(TorchDispatchMode):
    """The most bytes that a tensor takes which is made within, but for `of` itself."""

    def __init__(self, of: Tensor) -> None:
        super().__init__()
        self.of, self.bytes = of.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() != self.of:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def test_pictures_stay_in_the_files_pages(data: Path, on_host: Split) -> None:
    """Nothing of their size is made: a batch is two rows of 64, and its canvas 28 KB."""
    images = on_host.images
    pages = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(data / "train" / "data-00000-of-00001.arrow"))
    ]
    assert any(begin <= images.data_ptr() < end for begin, end in pages)
    batches_of = partial(plan, batch_size=2, micro_batches=1)
    sizes = []
    for split in (on_host, replace(on_host, on_host=False)):
        with stream_images(MIXED, split, ROWS, batches_of) as pictures, Largest(images) as largest:
            augment = Augment(MIXED, split, ROWS, host=pictures)
            shown(augment, batches_of(split))
            shown(augment.clone(), batches_of(split))
        sizes.append(largest.bytes)
        if pictures:
            assert max(len(fetch.result().pictures) for fetch in pictures.coming) == 4
    assert sizes[0] < images.nbytes < sizes[1]


class OntoPretendedGpu(StreamedImages):
    """Streamed, but what comes is pretended to be on a GPU: of the right size, without numbers."""

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        pictures = super().__call__(view, rows)
        return torch.empty(pictures.shape, dtype=pictures.dtype, device=GPU)


@pytest.mark.parametrize("config", [CROP_FLIP, ALL_OPS], ids=["crop and flip", "all operations"])
def test_a_step_reads_no_rows_back_from_a_gpu(on_host: Split, config: AugmentConfig) -> None:
    """The rows that it asks by lie there; the thread has made a plan of its own."""
    pictures = OntoPretendedGpu(on_host, rows_in_order(config, plan(on_host), ROWS))
    try:
        with PRETENDED:
            labels, rows = torch.zeros(64, dtype=torch.int64, device=GPU), torch.arange(5, 64)
            split = Split(images=on_host.images, labels=labels, on_host=True)
            batches, augment = plan(split, rows), Augment(config, split, rows, host=pictures)
            counts = []
            for _ in range(3):
                with Waits() as waits:
                    shown(augment, batches, steps=1)
                counts.append(waits.count)
    finally:
        pictures.close()
    assert counts[0] > 0, "the order and the table of the epoch go to the device"
    assert counts[1:] == [0, 0]


def test_rows_come_in_the_order_of_the_plan_alone(on_host: Split) -> None:
    steps = [[torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4])]]
    pictures = StreamedImages(on_host, iter(steps))
    try:
        assert torch.equal(pictures(0, torch.tensor([1, 2])), on_host.images[1:3])
        with pytest.raises(AssertionError, match="another order"):
            pictures(0, torch.tensor([4]))
    finally:
        pictures.close()


def test_an_error_of_the_thread_is_the_steps(on_host: Split) -> None:
    """Not before the step that it concerns, and nothing is left behind."""
    steps = iter([[torch.tensor([1])], [torch.tensor([64])], [torch.tensor([1])]])
    pictures = StreamedImages(on_host, steps)
    try:
        assert torch.equal(pictures(0, torch.tensor([1])), on_host.images[1:2])
        with pytest.raises(IndexError, match="out of range"):
            pictures(0, torch.tensor([64]))
    finally:
        pictures.close()
    assert not threads()


@pytest.mark.parametrize("taken", [0, 1])
def test_the_thread_ends_with_its_user(on_host: Split, taken: int) -> None:
    def use() -> None:
        with stream_images(MIXED, on_host, ROWS, plan) as pictures:
            shown(Augment(MIXED, on_host, ROWS, host=pictures), plan(on_host), steps=taken)
            assert len(threads()) == 1
            raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        use()
    assert not threads()


def test_nobody_is_ahead_where_there_is_nothing_to_fetch(data: Path, on_host: Split) -> None:
    for config, split in ((CROP_FLIP, load_split(data, "train")), (INLINE, on_host)):
        with stream_images(config, split, ROWS, plan) as pictures:
            assert pictures is None
            assert not threads()


def test_workers_that_fill_the_device_are_refused(recipe: RecipeMaker) -> None:
    path = recipe(augment={"host": list(INLINE.albumentations or ())}, data={"place": "host"})
    with pytest.raises(UserError, match=r"set augment\.workers=0, or data\.place=device"):
        load_recipe(path)
    assert load_recipe(path, ["augment.workers=0"]).data.place == "host"
    assert load_recipe(path, ["data.place=device"]).augment.workers == 2


# ----------------------------------------------------------------------------- runs


def test_a_run_has_the_same_bits(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two micro-batches, MixUp and CutMix, dropout, an average; one process and two."""
    path = recipe(run={"epochs": 2})
    train(path, "name=device", cwd=tmp_path)
    for world_size in (1, 2):
        name = f"host{world_size}"
        train(path, f"name={name}", "data.place=host", cwd=tmp_path, world_size=world_size)
        assert_same_bits(tmp_path / "runs/device", tmp_path / "runs" / name)


def test_all_that_looks_at_pictures_again_finds_the_same(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    """Statistics of an SWA, held-out rows, two copies of a row, `evaluate` of the run."""
    path = recipe(
        run={"batch_size": 100, "epochs": 3},
        data={"path": str(middle_data), "val_size": 100},
        augment={"repeated": 2},
        ema={"kind": "swa", "start_epoch": 2, "decay": 0.999},
    )
    train(path, "name=device", cwd=tmp_path)
    train(path, "name=host", "data.place=host", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/device", tmp_path / "runs/host")
    ranks = Ranks("evaluate", ["runs/host", "--split", "val"], cwd=tmp_path)
    assert ranks.wait() == [0], ranks.output


def test_killed_runs_go_on_in_the_other_place(tmp_path: Path, recipe: RecipeMaker) -> None:
    """kill -9 mid-epoch; where pictures lie is no part of the recipe."""
    path = recipe(run={"epochs": 6})
    train(path, "name=straight", cwd=tmp_path)
    run, arguments = tmp_path / "runs/killed", [path, "name=killed"]
    arguments.append(f"run.save_every_minutes={EVERY_STEP}")
    for step, place in ((4, "host"), (14, "device"), (21, "host")):
        ranks = Ranks("train", [*arguments, f"data.place={place}"], cwd=tmp_path)
        wait_for_step(ranks, run, step)
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
    assert "goes on at step" in train(*arguments, "data.place=host", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", run)


def test_a_cache_of_logits_is_the_same(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big")
    caches = []
    for place in ("device", "host"):
        sections = taught("big", placement="cached", cache=place)
        path = recipe(augment={"views": 2}, data={"place": place}, **sections)
        ranks = Ranks("cache_logits", [path], cwd=tmp_path)
        assert ranks.wait() == [0], ranks.output
        caches.append((tmp_path / place / "logits.npy").read_bytes())
    assert caches[0] == caches[1]
