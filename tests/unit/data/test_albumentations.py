"""augment.albumentations: pipelines as data, and images that depend only on their key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar_dist.data.augment.albumentations_buffer import InlineImages
from cifar_dist.data.augment.albumentations_pipeline import SINGLE, Pipeline, load_library
from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.shared_memory import Layout, allocate
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.load import load_recipe
from cifar_dist.training.albumentations_workers import AlbumentationsWorkers, albumentations_workers
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, TeacherMaker, with_teachers

ONE_OF: dict[str, Any] = {
    "OneOf": {
        "transforms": [
            {"ShiftScaleRotate": {"p": 0.5}},
            {"CoarseDropout": {"fill": "random", "p": 0.5}},
            {"ColorJitter": {"p": 0.5}},
            {"OneOf": {"transforms": [{"HorizontalFlip": {}}, {"VerticalFlip": {}}], "p": 1.0}},
        ],
        "p": 1.0,
    }
}
PIPELINE = (ONE_OF, {"GaussNoise": {"std_range": [0.1, 0.2], "p": 0.5}})
CONFIG = AugmentConfig(albumentations=PIPELINE)
SINGLE_PROCESS = DistContext(0, 1, None)


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def inline(split: Split, view: int, rows: list[int], config: AugmentConfig = CONFIG) -> Tensor:
    assert config.albumentations is not None
    return InlineImages(config.albumentations, split, seed=config.seed)(view, torch.tensor(rows))


@contextmanager
def start_workers(split: Split, workers: int, **options: Any) -> Iterator[AlbumentationsWorkers]:
    config = AugmentConfig(albumentations=PIPELINE, workers=workers, **options)
    with albumentations_workers(config, split, SINGLE_PROCESS, 100) as images:
        assert images is not None
        yield images


# ----------------------------------------------------------------------------- keys


def test_image_depends_only_on_seed_view_and_row(split: Split) -> None:
    rows = list(range(64))
    images = inline(split, 3, rows)
    order = torch.randperm(64, generator=torch.manual_seed(0)).tolist()
    assert torch.equal(inline(split, 3, order), images[order])
    assert torch.equal(inline(split, 3, [5, 5, 5]), images[[5, 5, 5]])
    others = (
        inline(split, 4, rows),
        inline(split, 3, rows, AugmentConfig(albumentations=PIPELINE, seed=1)),
    )
    for other in others:
        assert sum(map(torch.equal, other, images)) < 16  # only flips may coincide


def test_rows_have_separate_random_streams_in_nested_groups() -> None:
    """One image under 64 keys; without reseeding, a transform would repeat or drift."""
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    noise = {"GaussNoise": {"std_range": [0.1, 0.4], "p": 1.0}}
    inner = {"OneOf": {"transforms": [noise, {"PixelDropout": {"dropout_prob": 0.3}}], "p": 1.0}}
    pipeline = Pipeline([{"OneOf": {"transforms": [inner, noise], "p": 1.0}}], image_size=32)
    first = [pipeline(image, 7, row).tobytes() for row in range(64)]
    assert len(set(first)) == 64
    assert [pipeline(image, 7, row).tobytes() for row in reversed(range(64))] == first[::-1]
    assert not set(first) & {pipeline(image, 8, row).tobytes() for row in range(64)}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "CropAndPad": {"px": [-4, 4]},
    "GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 3},
    "RandomResizedCrop": {"size": [32, 32]},
    "RandomSizedCrop": {"size": [32, 32], "min_max_height": [20, 30]},
}
SLOW = {"Superpixels", "RandomFog"}


@pytest.mark.parametrize("name", sorted({*SINGLE} - SLOW))
def test_every_transform_is_reseeded_for_each_image(name: str) -> None:
    """The image of a row does not depend on the images before it."""
    transform = [{name: {**ARGUMENTS.get(name, {}), "p": 1.0}}]
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    images = images.repeat(4, axis=2).repeat(4, axis=3)
    expected = {
        row: Pipeline(transform, image_size=32)(images[row], 1, row).tobytes() for row in range(6)
    }
    pipeline = Pipeline(transform, image_size=32)
    for row in (4, 2, 2, 5, 0, 3, 1):
        assert pipeline(images[row], 1, row).tobytes() == expected[row]


def test_one_of_chooses_by_weight() -> None:
    """The p of members are weights; with 1 - p of the group the image stays unchanged."""
    fills = [{"PixelDropout": {"dropout_prob": 1.0, "drop_value": level}} for level in (10, 20, 30)]
    weights = (0.5, 0.25, 0.25)
    for fill, weight in zip(fills, weights, strict=True):
        fill["PixelDropout"]["p"] = weight
    pipeline = Pipeline([{"OneOf": {"transforms": fills, "p": 0.8}}], image_size=32)
    image = np.zeros((3, 32, 32), np.uint8)
    counts = Counter(int(pipeline(image, 0, row)[0, 0, 0]) for row in range(6000))
    expected = {0: 0.2, 10: 0.4, 20: 0.2, 30: 0.2}
    chi_square = sum((counts[k] - 6000 * p) ** 2 / (6000 * p) for k, p in expected.items())
    assert sum(counts.values()) == 6000
    assert chi_square < 20  # 3 degrees of freedom: exceeded with probability 2e-4


def test_brightness_factor_is_uniform_in_its_range() -> None:
    """The brightness of a uniform image shows the factor, which follows U(0.6, 1.4)."""
    pipeline = Pipeline(
        [
            {
                "ColorJitter": {
                    "brightness": [0.6, 1.4],
                    "contrast": 0,
                    "saturation": 0,
                    "hue": 0,
                    "p": 1,
                }
            }
        ],
        image_size=32,
    )
    gray = np.full((3, 32, 32), 100, np.uint8)
    factors = np.array([pipeline(gray, 0, row)[0, 0, 0] / 100 for row in range(2000)])
    assert factors.min() >= 0.6 - 0.006
    assert factors.max() <= 1.4 + 0.006
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert factors.std() == pytest.approx(0.8 / 12**0.5, abs=0.01)


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"Lambda": {}}], "Lambda is not a supported transform"),
        ([{"HorizontalFip": {}}], "did you mean HorizontalFlip?"),
        ([{"os.system": {}}], "os.system is not a supported transform"),
        ([{"OneOf": {"transforms": [{"ToTensorV2": {}}]}}], "albumentations.0.OneOf.transforms.0"),
        ([{"OneOf": {"p": 1.0}}], "albumentations.0.OneOf.transforms: write a list"),
        ([], "write a list"),
        ([{"Blur": {}, "Sharpen": {}}], "write one name"),
        (["Blur"], "should be an object"),
    ],
)
def test_unsupported_names_are_refused_when_a_recipe_is_read(
    recipe: RecipeMaker, transforms: list[Any], message: str
) -> None:
    path = recipe(augment={"albumentations": transforms or None})
    with pytest.raises(UserError, match="augment") as caught:
        load_recipe(path, [] if transforms else ["augment.albumentations=[]"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (
            [{"CoarseDropout": {"fil": 1}}],
            "CoarseDropout.fil: unknown argument; did you mean fill?",
        ),
        ([{"CoarseDropout": {"max_holes": 8}}], "unknown argument"),
        ([{"HorizontalFlip": {"p": 2}}], "HorizontalFlip: p: "),
        ([{"Rotate": {"limit": "wide"}}], "Rotate: limit"),
        ([{"RandomResizedCrop": {"size": [16, 16]}}], "an image of 16x16x3 uint8"),
        ([{"RandomResizedCrop": {}}], "size: Field required"),
        ([{"OneOf": {"transforms": [{"Blur": {"p": 0}}]}}], "needs p > 0"),
    ],
)
def test_invalid_arguments_are_refused_when_the_pipeline_is_built(
    transforms: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"augment\.albumentations") as caught:
        Pipeline(transforms, image_size=32)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_of_a_transform_names_the_row() -> None:
    pipeline = Pipeline([{"HEStain": {"method": "macenko", "p": 1.0}}], image_size=32)
    message = r"augment\.albumentations failed at the image of row 7: .*remove"
    with pytest.raises(UserError, match=message):
        pipeline(np.full((3, 32, 32), 255, np.uint8), 0, 7)


def test_train_reports_invalid_arguments_without_a_traceback(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(augment={"albumentations": [{"Blur": {"blur_limt": 3}}]})
    output = train(path, cwd=tmp_path, expect=2)
    assert output.splitlines()[-1].startswith("error: augment.albumentations: Blur.blur_limt")
    assert "Traceback" not in output


def test_missing_library_or_other_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_dist.data.augment.albumentations_pipeline.VERSION", "1.4.0")
    with pytest.raises(UserError, match=r"albumentations 1\.4\.0, but 2\.0\.8 .*: pip install"):
        load_library()
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"needs albumentations \(.*\): pip install"):
        load_library()


def test_all_views_refuses_albumentations() -> None:
    with pytest.raises(ValueError, match="remove albumentations"):
        AugmentConfig(hflip=True, views="all", albumentations=PIPELINE)


def test_other_transforms_are_a_difference_between_recipes() -> None:
    other: dict[str, Any] = {"albumentations": [{"Sharpen": {}}]}
    assert flatten({"albumentations": [{"Blur": {}}]}) != flatten(other)


def test_too_little_space_is_an_error() -> None:
    with pytest.raises(UserError, match=r"not enough space .* in /dev/shm or .*; free some space"):
        allocate(Layout(rows=10**12, image_size=32, workers=1))


class TutorialDataset(Dataset[Tensor]):
    """The tutorial's dataset, which builds its transforms with their random state once."""

    def __init__(self) -> None:
        names = (
            "ShiftScaleRotate",
            "CoarseDropout",
            "ColorJitter",
            "HorizontalFlip",
            "VerticalFlip",
        )
        library = load_library()
        self.transforms = library.OneOf([vars(library)[name]() for name in names], p=1.0)
        self.images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.transforms(image=self.images[row])["image"].copy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_restarted_loader_workers_repeat_the_transforms_of_the_first_epoch(
    persistent: bool,
) -> None:
    """This is why the tutorial's recipe has views: 1; its loader restarts workers in each epoch."""
    loader = DataLoader(
        TutorialDataset(), batch_size=10, num_workers=2, persistent_workers=persistent
    )
    first, second = (torch.cat(list(loader)) for _ in range(2))
    assert torch.equal(first, second) == (not persistent)


def test_tutorial_recipe_has_the_same_view_in_each_epoch() -> None:
    path = Path(__file__).parents[3] / "recipes/tutorial/resnet18_augment.yaml"
    recipe = load_recipe(path)
    assert not recipe.data.shuffle
    assert recipe.augment.views_in_epoch(0) == recipe.augment.views_in_epoch(199)


# ----------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_give_the_same_images_as_the_training_process(split: Split, workers: int) -> None:
    """Consecutive epochs with views: 3, and a later start."""
    rows = torch.arange(64)
    with start_workers(split, workers, views=3) as images:
        for epoch in (0, 1, 2, 3, 9):
            assert images.wait_for_epoch(epoch)
            expected = inline(split, epoch % 3, list(range(64)))
            assert torch.equal(images(epoch % 3, rows), expected)


def test_next_epoch_is_filled_during_the_current_one(split: Split) -> None:
    with start_workers(split, 2) as workers:
        workers.wait_for_epoch(4)
        buffer = workers.images
        before = buffer(4, torch.arange(64))
        deadline = time.monotonic() + 60
        while not buffer.layout.is_full(buffer.file, 1, 5):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert torch.equal(buffer(4, torch.arange(64)), before)


def test_buffer_is_in_the_temporary_folder_without_shared_memory(
    split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "cifar_dist.data.augment.shared_memory.SHARED_MEMORY", str(tmp_path / "none")
    )
    with start_workers(split, 1) as workers:
        workers.wait_for_epoch(0)
        assert torch.equal(workers(0, torch.arange(64)), inline(split, 0, list(range(64))))
        assert str(tempfile.gettempdir()) in os.readlink(f"/proc/self/fd/{workers.images.file}")


def test_buffer_is_in_the_temporary_folder_if_shared_memory_is_not_writable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cifar_dist.data.augment.shared_memory.SHARED_MEMORY", "/proc")
    with allocate(Layout(rows=1, image_size=32, workers=1)) as file:
        assert str(tempfile.gettempdir()) in os.readlink(f"/proc/self/fd/{file.fileno()}")


def test_transforms_on_the_device_follow_the_pipeline(split: Split) -> None:
    """Crop, flip, cutout and mixing get the images of the pipeline, partners included."""
    options: dict[str, Any] = {"crop_padding": 4, "hflip": True, "cutout": 8, "mixup": 0.4}
    batch = gather_batch(split, torch.arange(64), epoch=2, micro_batch=0)
    precomputed = Split(images=inline(split, 2, list(range(64))), labels=split.labels)
    expected = Augment(AugmentConfig(**options), precomputed)(
        gather_batch(precomputed, batch.rows, epoch=2, micro_batch=0)
    )
    result = Augment(AugmentConfig(albumentations=PIPELINE, **options), split)(batch)
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.view_ids, expected.view_ids)


def test_dead_worker_is_reported(split: Split) -> None:
    with start_workers(split, 2) as workers:
        workers.wait_for_epoch(0)
        workers.images.workers[1].kill()
        workers.images.workers[1].wait()
        with pytest.raises(UserError, match="ended with signal SIGKILL; if memory"):
            workers.wait_for_epoch(0)


def children(pid: int) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            pids.append(int(path.parent.name))
    return pids


def worker_pids(ranks: Launch) -> list[int]:
    return [pid for process in ranks.processes if process.pid for pid in children(process.pid)]


def all_end(pids: list[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ----------------------------------------------------------------------------- runs


AUGMENT = {"albumentations": list(PIPELINE), "workers": 2, "crop_padding": 2, "cutout": 0}


def test_result_does_not_depend_on_workers_and_ranks(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(augment=AUGMENT)
    for name, workers, world_size in (("a", 0, 1), ("b", 2, 1), ("c", 1, 2), ("d", 4, 2)):
        arguments = (f"name={name}", f"augment.workers={workers}")
        train(path, *arguments, cwd=tmp_path, world_size=world_size)
    for name in "bcd":
        assert_same_bits(tmp_path / "runs/a", tmp_path / f"runs/{name}")


@pytest.mark.fault  # test_all_at_once.py has one such run in the default suite
def test_killed_run_resumes_with_another_number_of_workers(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """SIGKILL all ranks during an epoch; their workers end with them."""
    path = recipe(run={"epochs": 8}, augment=AUGMENT)
    train(path, "name=straight", cwd=tmp_path)
    run, arguments = tmp_path / "runs/killed", [path, "name=killed"]
    arguments.append(f"run.save_every_minutes={EVERY_STEP}")
    for step, workers in ((4, 2), (15, 0), (29, 1)):
        ranks = Launch("train", [*arguments, f"augment.workers={workers}"], cwd=tmp_path)
        wait_for_step(ranks, run, step)
        pids = worker_pids(ranks)
        assert len(pids) >= workers
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
        assert all_end(pids)
    train(*arguments, "augment.workers=4", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_ends_the_run_with_one_error(
    tmp_path: Path, recipe: RecipeMaker, rank: int
) -> None:
    path = recipe(run={"epochs": 100_000}, augment=AUGMENT)
    ranks = Launch(
        "train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=tmp_path, world_size=2
    )
    wait_for_step(ranks, tmp_path / "runs/tiny", 1)
    pid = ranks.processes[rank].pid
    assert pid is not None
    os.kill(children(pid)[0], signal.SIGKILL)
    assert ranks.wait(30) == [2, 2], ranks.output
    assert ranks.output.count("error: worker process") == 1
    assert "ended with signal SIGKILL" in ranks.output
    assert "Traceback" not in ranks.output


@pytest.mark.parametrize("event", ["stop signal", "killed worker"])
def test_waiting_for_the_first_epoch_ends_on_both_ranks(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, event: str
) -> None:
    """The first epoch takes about a minute; the event concerns one rank only."""
    slow = {"Superpixels": {"p_replace": [1, 1], "n_segments": [200, 200], "p": 1.0}}
    augment = {"albumentations": [slow], "workers": 1}
    path = recipe(augment=augment, data={"path": str(middle_data)})
    ranks = Launch("train", [path], cwd=tmp_path, world_size=2)
    deadline = time.monotonic() + 120
    while "epochs of" not in ranks.output and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = ranks.processes[1].pid
    assert pid is not None
    if event == "stop signal":
        os.kill(pid, signal.SIGTERM)
        assert ranks.wait(20) == [75, 75], ranks.output
        assert "at step 0" in ranks.output
    else:
        os.kill(children(pid)[0], signal.SIGKILL)
        assert ranks.wait(20) == [2, 2], ranks.output
        assert ranks.output.count("ended with signal SIGKILL") == 1


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_to_all_processes_saves_and_the_run_resumes(
    tmp_path: Path, recipe: RecipeMaker, number: signal.Signals
) -> None:
    """Slurm signals workers as well; the resumed run has the same bits."""
    path = recipe(run={"epochs": 40, "eval_every_epochs": 20}, augment=AUGMENT)
    ranks = Launch(
        "train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=tmp_path, world_size=2
    )
    wait_for_step(ranks, tmp_path / "runs/tiny", 1)
    pids = worker_pids(ranks)
    assert len(pids) == 4
    for pid in pids:
        os.kill(pid, number)
    for process in ranks.processes:
        assert process.pid is not None
        os.kill(process.pid, number)
    assert ranks.wait() == [75, 75], ranks.output
    assert all_end(pids)
    train(path, cwd=tmp_path, world_size=1)
    train(path, "name=straight", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/tiny")


def test_sigterm_to_the_process_group_saves_and_stops(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Uses a new interpreter, and sends SIGTERM while workers may still be starting."""
    path = recipe(run={"epochs": 100_000}, augment=AUGMENT)
    command = [sys.executable, "-m", "cifar_dist.train", str(path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "the same command resumes" in output


def test_logit_cache_uses_the_images_of_the_pipeline(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks cache two views; a student may use another number of workers, not another pipeline."""
    monkeypatch.chdir(tmp_path)
    teacher("big")
    sections = with_teachers("big", placement="cached")
    path = recipe(augment={**AUGMENT, "views": 2}, **sections)
    ranks = Launch("cache_logits", [path], cwd=tmp_path, world_size=2)
    assert ranks.wait() == [0, 0], ranks.output
    output = train(path, "augment.workers=1", cwd=tmp_path)
    assert "finished" in output
    train(path, "teacher.placement=replicated", "name=live", cwd=tmp_path)
    losses = []
    for name in ("tiny", "live"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the cache is fp16
    other = json.dumps([{"HorizontalFlip": {}}])
    output = train(path, f"augment.albumentations={other}", "name=other", cwd=tmp_path, expect=2)
    assert "was made for something else (augment.albumentations" in output
    assert asdict(load_recipe(path).augment)["workers"] == 2
