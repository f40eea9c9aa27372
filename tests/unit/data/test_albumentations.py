"""augment.albumentations: albumentations by data, each picture a function of its key, whoever makes it."""

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
from launcher import Ranks, train
from restarts import EVERY_STEP, wait_for_step
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar_dist.data.augment.albumentations_buffer import InlineImages
from cifar_dist.data.augment.albumentations_pipeline import SINGLE, Pipeline, load_library
from cifar_dist.data.augment.augmentation import Augment, AugmentConfig
from cifar_dist.data.augment.shared_memory import Layout, allocate
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.load import load_recipe
from cifar_dist.training.albumentations_workers import AlbumentationsWorkers, albumentations_workers
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, TeacherMaker, taught

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
HOST = (ONE_OF, {"GaussNoise": {"std_range": [0.1, 0.2], "p": 0.5}})
CONFIG = AugmentConfig(albumentations=HOST)
ALONE = RankGroup(0, 1, None)


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def inline(split: Split, view: int, rows: list[int], config: AugmentConfig = CONFIG) -> Tensor:
    assert config.albumentations is not None
    return InlineImages(config.albumentations, split, seed=config.seed)(view, torch.tensor(rows))


@contextmanager
def started(split: Split, workers: int, **keys: Any) -> Iterator[AlbumentationsWorkers]:
    config = AugmentConfig(albumentations=HOST, workers=workers, **keys)
    with albumentations_workers(config, split, ALONE, 100) as host:
        assert host is not None
        yield host


# ----------------------------------------------------------------------------- keys


def test_a_picture_is_a_function_of_its_key(split: Split) -> None:
    rows = list(range(64))
    together = inline(split, 3, rows)
    order = torch.randperm(64, generator=torch.manual_seed(0)).tolist()
    assert torch.equal(inline(split, 3, order), together[order])
    assert torch.equal(inline(split, 3, [5, 5, 5]), together[[5, 5, 5]])
    others = (
        inline(split, 4, rows),
        inline(split, 3, rows, AugmentConfig(albumentations=HOST, seed=1)),
    )
    for other in others:
        assert sum(map(torch.equal, other, together)) < 16  # only flips may meet


def test_every_row_has_a_stream_of_its_own_in_nested_groups() -> None:
    """One picture under 64 keys; a transform that were not re-keyed would repeat or drift."""
    picture = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    noise = {"GaussNoise": {"std_range": [0.1, 0.4], "p": 1.0}}
    inner = {"OneOf": {"transforms": [noise, {"PixelDropout": {"dropout_prob": 0.3}}], "p": 1.0}}
    pipeline = Pipeline([{"OneOf": {"transforms": [inner, noise], "p": 1.0}}])
    first = [pipeline(picture, 7, row).tobytes() for row in range(64)]
    assert len(set(first)) == 64
    assert [pipeline(picture, 7, row).tobytes() for row in reversed(range(64))] == first[::-1]
    assert not set(first) & {pipeline(picture, 8, row).tobytes() for row in range(64)}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "CropAndPad": {"px": [-4, 4]},
    "GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 3},
    "RandomResizedCrop": {"size": [32, 32]},
    "RandomSizedCrop": {"size": [32, 32], "min_max_height": [20, 30]},
}
SLOW = {"Superpixels", "RandomFog"}


@pytest.mark.parametrize("name", sorted({*SINGLE} - SLOW))
def test_every_allowed_transform_is_re_keyed(name: str) -> None:
    """The pictures of rows do not depend on what the transform did before them."""
    transform = [{name: {**ARGUMENTS.get(name, {}), "p": 1.0}}]
    pictures = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    pictures = pictures.repeat(4, axis=2).repeat(4, axis=3)
    forward = {row: Pipeline(transform)(pictures[row], 1, row).tobytes() for row in range(6)}
    pipeline = Pipeline(transform)
    for row in (4, 2, 2, 5, 0, 3, 1):
        assert pipeline(pictures[row], 1, row).tobytes() == forward[row]


def test_branches_are_chosen_by_their_weights() -> None:
    """6,000 keys; p of members are weights, and the group's own p leaves the rest alone."""
    fills = [{"PixelDropout": {"dropout_prob": 1.0, "drop_value": level}} for level in (10, 20, 30)]
    weights = (0.5, 0.25, 0.25)
    for fill, weight in zip(fills, weights, strict=True):
        fill["PixelDropout"]["p"] = weight
    pipeline = Pipeline([{"OneOf": {"transforms": fills, "p": 0.8}}])
    picture = np.zeros((3, 32, 32), np.uint8)
    found = Counter(int(pipeline(picture, 0, row)[0, 0, 0]) for row in range(6000))
    expected = {0: 0.2, 10: 0.4, 20: 0.2, 30: 0.2}
    chi_square = sum((found[k] - 6000 * p) ** 2 / (6000 * p) for k, p in expected.items())
    assert sum(found.values()) == 6000
    assert chi_square < 20  # 3 degrees of freedom: 2e-4 by chance


def test_parameters_stay_in_their_range() -> None:
    """Brightness of a grey picture is its factor, whose mean and spread are those of U(0.6, 1.4)."""
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
        ]
    )
    grey = np.full((3, 32, 32), 100, np.uint8)
    factors = np.array([pipeline(grey, 0, row)[0, 0, 0] / 100 for row in range(2000)])
    assert factors.min() >= 0.6 - 0.006
    assert factors.max() <= 1.4 + 0.006
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert factors.std() == pytest.approx(0.8 / 12**0.5, abs=0.01)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ([{"Lambda": {}}], "Lambda is not allowed here"),
        ([{"HorizontalFip": {}}], "did you mean HorizontalFlip?"),
        ([{"os.system": {}}], "os.system is not allowed here"),
        ([{"OneOf": {"transforms": [{"ToTensorV2": {}}]}}], "host.0.OneOf.transforms.0"),
        ([{"OneOf": {"p": 1.0}}], "host.0.OneOf.transforms: write a list"),
        ([], "write a list"),
        ([{"Blur": {}, "Sharpen": {}}], "write one name"),
        (["Blur"], "should be an object"),
    ],
)
def test_names_are_refused_where_a_recipe_is_read(
    recipe: RecipeMaker, host: list[Any], said: str
) -> None:
    with pytest.raises(UserError, match="augment") as caught:
        load_recipe(
            recipe(augment={"host": host or None}), [] if host else ["augment.albumentations=[]"]
        )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (
            [{"CoarseDropout": {"fil": 1}}],
            "CoarseDropout.fil: unknown argument; did you mean fill?",
        ),
        ([{"CoarseDropout": {"max_holes": 8}}], "unknown argument"),
        ([{"HorizontalFlip": {"p": 2}}], "HorizontalFlip: p: "),
        ([{"Rotate": {"limit": "wide"}}], "Rotate: limit"),
        ([{"RandomResizedCrop": {"size": [16, 16]}}], "a picture of 16x16x3 uint8"),
        ([{"RandomResizedCrop": {}}], "size: Field required"),
        ([{"OneOf": {"transforms": [{"Blur": {"p": 0}}]}}], "needs a p above 0"),
    ],
)
def test_arguments_are_refused_before_training(host: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=r"augment\.host") as caught:
        Pipeline(host)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transform_that_fails_at_a_picture_names_its_row() -> None:
    pipeline = Pipeline([{"HEStain": {"method": "macenko", "p": 1.0}}])
    with pytest.raises(UserError, match=r"augment\.host failed at the picture of row 7: .*remove"):
        pipeline(np.full((3, 32, 32), 255, np.uint8), 0, 7)


def test_a_run_refuses_arguments_with_one_sentence(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(augment={"host": [{"Blur": {"blur_limt": 3}}]})
    output = train(path, cwd=tmp_path, expect=2)
    assert output.splitlines()[-1].startswith("error: augment.albumentations: Blur.blur_limt")
    assert "Traceback" not in output


def test_a_missing_or_other_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_dist.data.augment.albumentations_pipeline.VERSION", "1.4.0")
    with pytest.raises(UserError, match=r"means albumentations 1\.4\.0, not 2\.0\.8: pip install"):
        load_library()
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"needs albumentations \(.*\): pip install"):
        load_library()


def test_all_views_of_a_host_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="remove host"):
        AugmentConfig(hflip=True, views="all", albumentations=HOST)


def test_a_change_of_arguments_is_a_change_of_the_recipe() -> None:
    assert flatten({"host": [{"Blur": {}}]}) != flatten({"host": [{"Sharpen": {}}]})


def test_too_little_room_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"needs .* MiB in /dev/shm or .* no room; free some"):
        allocate(Layout(rows=10**12, workers=1))


class LikeTheTutorials(Dataset[Tensor]):
    """Its data set: the transforms are made once, with the state that they then have."""

    def __init__(self) -> None:
        names = (
            "ShiftScaleRotate",
            "CoarseDropout",
            "ColorJitter",
            "HorizontalFlip",
            "VerticalFlip",
        )
        library = load_library()
        self.changes = library.OneOf([vars(library)[name]() for name in names], p=1.0)
        self.pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.changes(image=self.pictures[row])["image"].copy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_plain_loaders_show_the_same_changes_in_each_epoch(persistent: bool) -> None:
    """Why the tutorial's recipe has views: 1; its loader has such workers, that live for an epoch."""
    loader = DataLoader(
        LikeTheTutorials(), batch_size=10, num_workers=2, persistent_workers=persistent
    )
    first, second = (torch.cat(list(loader)) for _ in range(2))
    assert torch.equal(first, second) == (not persistent)


def test_the_tutorials_recipe_shows_the_same_changes_in_each_epoch() -> None:
    path = Path(__file__).parents[3] / "recipes/tutorial/resnet18_augment.yaml"
    recipe = load_recipe(path)
    assert not recipe.data.shuffle
    assert recipe.augment.views_in_epoch(0) == recipe.augment.views_in_epoch(199)


# ----------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_make_the_same_pictures(split: Split, workers: int) -> None:
    """Each epoch of views: 3, one after the other and from the middle on."""
    rows = torch.arange(64)
    with started(split, workers, views=3) as host:
        for epoch in (0, 1, 2, 3, 9):
            assert host.wait_for_epoch(epoch)
            expected = inline(split, epoch % 3, list(range(64)))
            assert torch.equal(host(epoch % 3, rows), expected)


def test_the_next_epoch_is_filled_while_this_one_is_shown(split: Split) -> None:
    with started(split, 2) as host:
        host.wait_for_epoch(4)
        pictures = host.images
        before = pictures(4, torch.arange(64))
        deadline = time.monotonic() + 60
        while not pictures.layout.is_full(pictures.file, 1, 5):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert torch.equal(pictures(4, torch.arange(64)), before)


def test_a_full_memory_gives_way_to_the_temporary_folder(
    split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "cifar_dist.data.augment.shared_memory.SHARED_MEMORY", str(tmp_path / "none")
    )
    with started(split, 1) as host:
        host.wait_for_epoch(0)
        assert torch.equal(host(0, torch.arange(64)), inline(split, 0, list(range(64))))
        assert str(tempfile.gettempdir()) in os.readlink(f"/proc/self/fd/{host.images.file}")


def test_a_memory_that_nobody_may_write_gives_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_dist.data.augment.shared_memory.SHARED_MEMORY", "/proc")
    with allocate(Layout(rows=1, workers=1)) as file:
        assert str(tempfile.gettempdir()) in os.readlink(f"/proc/self/fd/{file.fileno()}")


def test_the_device_goes_on_where_the_host_ends(split: Split) -> None:
    """Crop, flip, cutout and mixing see the host's pictures, partners' included."""
    keys: dict[str, Any] = {"crop_padding": 4, "hflip": True, "cutout": 8, "mixup": 0.4}
    batch = gather_batch(split, torch.arange(64), epoch=2, micro_batch=0)
    hosted = Split(images=inline(split, 2, list(range(64))), labels=split.labels)
    expected = Augment(AugmentConfig(**keys), hosted)(
        gather_batch(hosted, batch.rows, epoch=2, micro_batch=0)
    )
    found = Augment(AugmentConfig(albumentations=HOST, **keys), split)(batch)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.view_ids, expected.view_ids)


def test_a_dead_worker_is_found_at_once(split: Split) -> None:
    with started(split, 2) as host:
        host.wait_for_epoch(0)
        host.images.workers[1].kill()
        host.images.workers[1].wait()
        with pytest.raises(UserError, match="ended with signal SIGKILL; if memory"):
            host.wait_for_epoch(0)


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def workers_of(ranks: Ranks) -> list[int]:
    return [pid for process in ranks.processes if process.pid for pid in children(process.pid)]


def gone(pids: list[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ----------------------------------------------------------------------------- runs


AUGMENT = {"host": list(HOST), "workers": 2, "crop_padding": 2, "cutout": 0}


def test_workers_and_ranks_change_no_bit(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(augment=AUGMENT)
    for name, workers, world_size in (("a", 0, 1), ("b", 2, 1), ("c", 1, 2), ("d", 4, 2)):
        arguments = (f"name={name}", f"augment.workers={workers}")
        train(path, *arguments, cwd=tmp_path, world_size=world_size)
    for name in "bcd":
        assert_same_bits(tmp_path / "runs/a", tmp_path / f"runs/{name}")


@pytest.mark.fault  # one such run with kills is in test_all_at_once.py
def test_killed_runs_go_on_with_other_workers(tmp_path: Path, recipe: RecipeMaker) -> None:
    """kill -9 of all ranks mid-epoch; their workers go with them, and leave no file."""
    path = recipe(run={"epochs": 8}, augment=AUGMENT)
    train(path, "name=straight", cwd=tmp_path)
    run, arguments = tmp_path / "runs/killed", [path, "name=killed"]
    arguments.append(f"run.save_every_minutes={EVERY_STEP}")
    for step, workers in ((4, 2), (15, 0), (29, 1)):
        ranks = Ranks("train", [*arguments, f"augment.workers={workers}"], cwd=tmp_path)
        wait_for_step(ranks, run, step)
        pids = workers_of(ranks)
        assert len(pids) >= workers
        ranks.kill()
        assert not (run / "summary.json").exists(), "the run ended before it could be killed"
        assert gone(pids)
    train(*arguments, "augment.workers=4", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_run(tmp_path: Path, recipe: RecipeMaker, rank: int) -> None:
    """Whichever rank it worked for: one sentence, in seconds, mid-epoch."""
    path = recipe(run={"epochs": 100_000}, augment=AUGMENT)
    ranks = Ranks(
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


@pytest.mark.parametrize("harm", ["signal", "kill"])
def test_nobody_waits_for_a_slow_epoch(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, harm: str
) -> None:
    """Both ranks wait a minute for the first epoch; a signal to one, or its dead worker, ends it."""
    slow = {"Superpixels": {"p_replace": [1, 1], "n_segments": [200, 200], "p": 1.0}}
    path = recipe(augment={"host": [slow], "workers": 1}, data={"path": str(middle_data)})
    ranks = Ranks("train", [path], cwd=tmp_path, world_size=2)
    deadline = time.monotonic() + 120
    while "epochs of" not in ranks.output and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = ranks.processes[1].pid
    assert pid is not None
    if harm == "signal":
        os.kill(pid, signal.SIGTERM)
        assert ranks.wait(20) == [75, 75], ranks.output
        assert "at step 0" in ranks.output
    else:
        os.kill(children(pid)[0], signal.SIGKILL)
        assert ranks.wait(20) == [2, 2], ranks.output
        assert ranks.output.count("ended with signal SIGKILL") == 1


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_and_stops(
    tmp_path: Path, recipe: RecipeMaker, number: signal.Signals
) -> None:
    """As Slurm does it: workers get it too, and the run goes on to the same bits."""
    path = recipe(run={"epochs": 40, "eval_every_epochs": 20}, augment=AUGMENT)
    ranks = Ranks(
        "train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=tmp_path, world_size=2
    )
    wait_for_step(ranks, tmp_path / "runs/tiny", 1)
    pids = workers_of(ranks)
    assert len(pids) == 4
    for pid in pids:
        os.kill(pid, number)
    for process in ranks.processes:
        assert process.pid is not None
        os.kill(process.pid, number)
    assert ranks.wait() == [75, 75], ranks.output
    assert gone(pids)
    train(path, cwd=tmp_path, world_size=1)
    train(path, "name=straight", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/tiny")


def test_a_process_group_is_signalled_and_ends(tmp_path: Path, recipe: RecipeMaker) -> None:
    """In an interpreter of its own, SIGTERM to its whole group while workers may still start."""
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
    assert "all saved" in output


def test_a_cached_teacher_sees_the_hosts_pictures(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views written down by two ranks, then a student; host_workers is none of the cache's."""
    monkeypatch.chdir(tmp_path)
    teacher("big")
    sections = taught("big", placement="cached")
    path = recipe(augment={**AUGMENT, "views": 2}, **sections)
    made = Ranks("cache_logits", [path], cwd=tmp_path, world_size=2)
    assert made.wait() == [0, 0], made.output
    output = train(path, "augment.workers=1", cwd=tmp_path)
    assert "finished" in output
    train(path, "teacher.placement=replicated", "name=live", cwd=tmp_path)
    losses = []
    for name in ("tiny", "live"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the cache is fp16
    changed = json.dumps([{"HorizontalFlip": {}}])
    output = train(path, f"augment.albumentations={changed}", "name=other", cwd=tmp_path, expect=2)
    assert "was made for something else (augment.albumentations" in output
    assert asdict(load_recipe(path).augment)["workers"] == 2
