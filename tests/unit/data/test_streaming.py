"""data.place: host: images are prefetched from the memory-mapped file, with identical results."""

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
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step
from step_cost import ALL_OPS, CROP_FLIP, GPU, PRETENDED, Waits
from streams import ROWS, augment_steps, plan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.batches import Batch, eval_blocks
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.streaming import StreamedImages, rows_per_step, stream_images
from cifar_dist.recipe.load import load_recipe
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, TeacherMaker, with_teachers

MIXED = AugmentConfig(crop_padding=4, hflip=True, cutout=8, mixup=0.2, cutmix=1.0)
CONFIGS = {
    "plain": AugmentConfig(),
    "crop and flip": CROP_FLIP,
    "mixed": MIXED,
    "two copies": replace(MIXED, repeated=2),
}
INLINE = AugmentConfig(albumentations=({"GaussNoise": {"p": 1.0}},), workers=0, crop_padding=2)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture
def on_host(data: Path) -> Split:
    return load_split(data, "train", place="host")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": False}, {"start_step": 9, "rank": 1, "world_size": 2}],
    ids=["one process", "unshuffled", "second of two ranks, later start"],
)
def test_augmented_batches_equal_those_of_a_split_on_the_device(
    data: Path, on_host: Split, config: AugmentConfig, options: dict[str, Any]
) -> None:
    """Covers two epoch boundaries, partners, copies and labels."""

    def make_batches(split: Split) -> Iterator[list[Batch]]:
        return plan(split, repeated=config.repeated, **options)

    split = load_split(data, "train")
    expected = augment_steps(Augment(config, split, ROWS), make_batches(split))
    with stream_images(config, on_host, ROWS, make_batches) as images:
        assert images is not None
        augment = Augment(config, on_host, ROWS, image_source=images)
        results = augment_steps(augment, make_batches(on_host))
    assert len(results) == len(expected) >= 12
    for one, other in zip(results, expected, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, tensor in vars(one).items():
            assert tensor is vars(other)[name] or torch.equal(tensor, vars(other)[name]), name


def test_images_that_are_not_prefetched_are_read_on_demand(data: Path, on_host: Split) -> None:
    """Evaluation blocks, clones, fixed views and albumentations pipelines."""
    splits, rows = (load_split(data, "train"), on_host), torch.arange(64)
    blocks = (eval_blocks(s, rows, block_size=25, rank=0, world_size=1) for s in splits)
    for one, other in zip(*blocks, strict=True):
        assert torch.equal(one.images, other.images)
    for config in (*CONFIGS.values(), INLINE):
        augments = [Augment(config, split, ROWS) for split in splits]
        for view_id in (None, 1):
            views = [
                augment_steps(augment.clone(view_id=view_id), plan(augment.split), steps=1)
                for augment in augments
            ]
            assert all(torch.equal(a.images, b.images) for a, b in zip(*views, strict=True))


class LargestAllocation(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that is created, except `ignored`."""

    def __init__(self, ignored: Tensor) -> None:
        super().__init__()
        self.ignored, self.bytes = ignored.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() != self.ignored:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def test_images_are_never_copied_as_a_whole(data: Path, on_host: Split) -> None:
    """A batch has two of 64 rows; its padded images take 28 KB."""
    images = on_host.images
    pages = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(data / "train" / "data-00000-of-00001.arrow"))
    ]
    assert any(begin <= images.data_ptr() < end for begin, end in pages)
    make_batches = partial(plan, batch_size=2, micro_batches=1)
    sizes = []
    for split in (on_host, replace(on_host, on_host=False)):
        with (
            stream_images(MIXED, split, ROWS, make_batches) as streamed,
            LargestAllocation(images) as largest,
        ):
            augment = Augment(MIXED, split, ROWS, image_source=streamed)
            augment_steps(augment, make_batches(split))
            augment_steps(augment.clone(), make_batches(split))
        sizes.append(largest.bytes)
        if streamed:
            assert max(len(step.result().images) for step in streamed.pending) == 4
    assert sizes[0] < images.nbytes < sizes[1]


class StreamedToFakeGpu(StreamedImages):
    """Returns fake tensors of the right shape on a GPU."""

    def __call__(self, view: int, rows: Tensor) -> Tensor:
        images = super().__call__(view, rows)
        return torch.empty(images.shape, dtype=images.dtype, device=GPU)


@pytest.mark.parametrize("config", [CROP_FLIP, ALL_OPS], ids=["crop and flip", "all operations"])
def test_steps_do_not_synchronize_with_a_gpu(on_host: Split, config: AugmentConfig) -> None:
    """The requested rows are on the GPU; the thread computes them separately on the CPU."""
    images = StreamedToFakeGpu(on_host, rows_per_step(config, plan(on_host), ROWS))
    try:
        with PRETENDED:
            labels, rows = torch.zeros(64, dtype=torch.int64, device=GPU), torch.arange(5, 64)
            split = Split(images=on_host.images, labels=labels, on_host=True)
            augment = Augment(config, split, rows, image_source=images)
            batches, counts = plan(split, rows), []
            for _ in range(3):
                with Waits() as waits:
                    augment_steps(augment, batches, steps=1)
                counts.append(waits.count)
    finally:
        images.close()
    assert counts[0] > 0, "the order and the tables of the epoch are copied to the device"
    assert counts[1:] == [0, 0]


def test_rows_must_be_requested_in_order(on_host: Split) -> None:
    steps = [[torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4])]]
    images = StreamedImages(on_host, iter(steps))
    try:
        assert torch.equal(images(0, torch.tensor([1, 2])), on_host.images[1:3])
        with pytest.raises(AssertionError, match="out of order"):
            images(0, torch.tensor([4]))
    finally:
        images.close()


def test_error_of_the_thread_is_raised_in_its_step(on_host: Split) -> None:
    steps = iter([[torch.tensor([1])], [torch.tensor([64])], [torch.tensor([1])]])
    images = StreamedImages(on_host, steps)
    try:
        assert torch.equal(images(0, torch.tensor([1])), on_host.images[1:2])
        with pytest.raises(IndexError, match="out of range"):
            images(0, torch.tensor([64]))
    finally:
        images.close()
    assert not threads()


@pytest.mark.parametrize("steps", [0, 1])
def test_thread_ends_after_an_error(on_host: Split, steps: int) -> None:
    def fail() -> None:
        with stream_images(MIXED, on_host, ROWS, plan) as images:
            augment_steps(
                Augment(MIXED, on_host, ROWS, image_source=images), plan(on_host), steps=steps
            )
            assert len(threads()) == 1
            raise KeyError("in the context")

    with pytest.raises(KeyError, match="in the context"):
        fail()
    assert not threads()


def test_no_thread_starts_if_nothing_can_be_prefetched(data: Path, on_host: Split) -> None:
    for config, split in ((CROP_FLIP, load_split(data, "train")), (INLINE, on_host)):
        with stream_images(config, split, ROWS, plan) as images:
            assert images is None
            assert not threads()


def test_albumentations_workers_with_place_host_are_an_error(recipe: RecipeMaker) -> None:
    augment = {"albumentations": list(INLINE.albumentations or ())}
    path = recipe(augment=augment, data={"place": "host"})
    with pytest.raises(UserError, match=r"set augment\.workers=0, or data\.place=device"):
        load_recipe(path)
    assert load_recipe(path, ["augment.workers=0"]).data.place == "host"
    assert load_recipe(path, ["data.place=device"]).augment.workers == 2


# ----------------------------------------------------------------------------- runs


def test_run_matches_one_with_images_on_the_device(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two micro-batches, MixUp and CutMix, dropout and weight averaging; one and two processes."""
    path = recipe(run={"epochs": 2})
    train(path, "name=device", cwd=tmp_path)
    for world_size in (1, 2):
        name = f"host{world_size}"
        train(path, f"name={name}", "data.place=host", cwd=tmp_path, world_size=world_size)
        assert_same_bits(tmp_path / "runs/device", tmp_path / "runs" / name)


def test_swa_statistics_validation_and_evaluate_match(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    """BatchNorm statistics of SWA, validation rows, two copies of a row, `evaluate` of the run."""
    path = recipe(
        run={"batch_size": 100, "epochs": 3},
        data={"path": str(middle_data), "val_size": 100},
        augment={"repeated": 2},
        averaging={"kind": "swa", "start_epoch": 2, "decay": 0.999},
    )
    train(path, "name=device", cwd=tmp_path)
    train(path, "name=host", "data.place=host", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/device", tmp_path / "runs/host")
    ranks = Launch("evaluate", ["runs/host", "--split", "val"], cwd=tmp_path)
    assert ranks.wait() == [0], ranks.output


def test_killed_run_resumes_with_another_place(tmp_path: Path, recipe: RecipeMaker) -> None:
    """SIGKILL during an epoch; data.place may change when a run resumes."""
    path = recipe(run={"epochs": 6})
    train(path, "name=straight", cwd=tmp_path)
    run, arguments = tmp_path / "runs/killed", [path, "name=killed"]
    arguments.append(f"run.save_every_minutes={EVERY_STEP}")
    for step, place in ((4, "host"), (14, "device"), (21, "host")):
        ranks = Launch("train", [*arguments, f"data.place={place}"], cwd=tmp_path)
        wait_for_step(ranks, run, step)
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
    assert "resuming from step" in train(*arguments, "data.place=host", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", run)


def test_logit_cache_matches_one_with_images_on_the_device(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big")
    caches = []
    for place in ("device", "host"):
        sections = with_teachers("big", placement="cached", cache=place)
        path = recipe(augment={"views": 2}, data={"place": place}, **sections)
        ranks = Launch("cache_logits", [path], cwd=tmp_path)
        assert ranks.wait() == [0], ranks.output
        caches.append((tmp_path / place / "logits.npy").read_bytes())
    assert caches[0] == caches[1]
