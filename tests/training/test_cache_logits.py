"""Cached logits match the online teacher's, rounded to float16; a wrong cache is an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from compare import lines
from launcher import Launch, train

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import load_split
from cifar_dist.distill.logit_cache import CacheWriter, check_cache, open_logits, partial_path
from cifar_dist.distill.teacher import CachedTeacher, build_teacher
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.teachers import find_teacher
from recipes import RecipeMaker, TeacherMaker, with_teachers

VIEWS = {"crop_padding": 2, "hflip": True, "cutout": 0, "mixup": 0, "cutmix": 0, "views": 3}
CPU = torch.device("cpu")


def cache(*arguments: object, cwd: Path, world_size: int = 1, expect: int = 0) -> str:
    ranks = Launch("cache_logits", arguments, cwd=cwd, world_size=world_size)
    codes = ranks.wait()
    assert codes == [expect] * world_size, f"exit codes {codes}:\n{ranks.output}"
    return ranks.output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cached(*names: str, **augment: Any) -> dict[str, Any]:
    return with_teachers(*names, placement="cached") | {"augment": VIEWS | augment}


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"cutout": 8, "mixup": 0.4, "cutmix": 1.0, "rand_augment": {}},
        {"views": "all"},
        {"repeated": 2},
    ],
    ids=["crop and flip", "cutout, mixing and policies", "all views", "repeated"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_logits_match_the_online_teacher(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    augment: dict[str, Any],
    precision: str,
) -> None:
    """In any batch of any epoch, within half a unit in the last place of float16.

    That is 2^-11 of a logit, and 2^-25 near zero. In fp32 the online teacher's forward of another batch
    differs by rounding, up to 1e-5 here; in bf16 at most by one bit of bfloat16.
    """
    teacher("big", backbone="test_vit", image_size=48)
    path = recipe(**cached("big", **augment), run={"precision": precision})
    cache(path, cwd=tmp_path)
    config = load_recipe(path)
    split = load_split(Path(config.data.path), "train")
    folder = tmp_path / "runs/big"
    online_configs = load_recipe(
        path, [f"teacher.run={folder}", "teacher.placement=replicated"]
    ).all_teachers
    online = build_teacher(
        online_configs,
        [find_teacher(online_configs[0])],
        num_classes=100,
        device=CPU,
        mesh=lambda over: None,
    )
    assert online is not None
    cached_teacher = CachedTeacher(open_logits(folder / "logits"))
    augment_batch = Augment(config.augment, split)
    for epoch, rows in enumerate([range(64), [5], range(40, 3, -1), [7, 7], range(20)]):
        copies = torch.arange(len(rows)) % 2 if config.augment.repeated == 2 else None
        batch = gather_batch(
            split, torch.tensor(list(rows)), epoch=epoch, micro_batch=0, copies=copies
        )
        view = augment_batch(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = online(view, batch)
        result = cached_teacher(view, batch)
        assert result.dtype == torch.float32
        tolerance = 1e-5 if precision == "fp32" else 0.02
        assert ((result - expected).abs() <= 2**-11 * expected.abs() + tolerance).all()
        if (
            epoch == 0 and config.augment.views != "all" and copies is None
        ):  # the block that was cached
            assert torch.equal(result, expected.half().float())
    assert len(cached_teacher.logits.unique(dim=0)) > len(cached_teacher.logits) / 2


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_training_with_a_cache_matches_the_online_teacher(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    precision: str,
) -> None:
    """24 steps at a small learning rate on two ranks: each logged value within 0.2 %."""
    teacher("big", image_size=48)
    teacher("cosines", head="cosine", losses={"arcface": {"scale": 20}})
    path = recipe(
        **cached("big", "cosines"),
        run={"precision": precision, "log_every_steps": 1},
        optim={"lr": 1e-5},
    )
    cache(path, cwd=tmp_path, world_size=2)
    train(path, "name=cached", cwd=tmp_path, world_size=2)
    sections = yaml.safe_load(path.read_text())
    for section in sections["teachers"]:
        section["placement"] = "sharded"
    path.write_text(yaml.safe_dump(sections))
    train(path, "name=sharded", cwd=tmp_path, world_size=2)
    pairs = zip(lines(tmp_path / "runs/cached"), lines(tmp_path / "runs/sharded"), strict=True)
    for from_cache, online in pairs:
        for name in ("loss", "distill", "cross_entropy"):
            if name in online:
                assert from_cache[name] == pytest.approx(online[name], rel=2e-3), name
    assert lines(tmp_path / "runs/cached")[-1]["step"] == 24


def test_resumed_cache_has_the_same_bytes(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    """162 blocks: SIGTERM to one of two processes, SIGKILL to one process, then three, sharded."""
    teacher("big", backbone="test_vit", image_size=96)
    path = recipe(**cached("big", crop_padding=4, views="all"))
    folder = tmp_path / "runs/big/logits"
    cache(path, f"teacher.cache={tmp_path / 'uninterrupted'}", cwd=tmp_path)

    def wait_for_rows(ranks: Launch, rows: int) -> None:
        file, deadline = partial_path(folder) / "logits.npy", time.monotonic() + 60
        while not file.exists() or file.stat().st_size < 128 + rows * 200:
            assert any(process.is_alive() for process in ranks.processes), ranks.output
            assert time.monotonic() < deadline
            time.sleep(0.01)

    ranks = Launch("cache_logits", [path], cwd=tmp_path, world_size=2)
    wait_for_rows(ranks, 64 * 20)
    os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output
    assert "run the same command again to resume" in ranks.output
    saved = json.loads((partial_path(folder) / "progress.json").read_text())["rows"]
    assert 64 * 20 <= saved < 64 * 162
    assert "not finished" in train(path, cwd=tmp_path, expect=2)
    ranks = Launch("cache_logits", [path], cwd=tmp_path)
    wait_for_rows(ranks, saved + 64 * 20)
    ranks.kill()
    assert not folder.exists()
    kept = json.loads((partial_path(folder) / "progress.json").read_text())["rows"]
    assert kept >= saved  # more if a slow machine took SAVE_SECONDS before the kill
    output = cache(path, "--sharded", cwd=tmp_path, world_size=3)
    assert f"resuming after {kept:,}" in output
    assert content(folder) == content(tmp_path / "uninterrupted")
    assert not partial_path(folder).exists()
    assert "is complete" in cache(path, cwd=tmp_path)
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "checkpoints",
        "logits",
        "recipe.yaml",
    ]


def test_students_with_other_seeds_and_settings_share_a_cache(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    teacher("big")
    path = recipe(**cached("big"), run={"epochs": 1})
    cache(path, cwd=tmp_path)
    before = content(tmp_path / "runs/big/logits")
    for overrides in (["run.seed=1"], ["optim.lr=0.1", "losses.distill.temperature=1"]):
        train(path, f"name=other{len(overrides)}", *overrides, cwd=tmp_path)
        assert "is complete" in cache(path, *overrides, cwd=tmp_path)
    assert content(tmp_path / "runs/big/logits") == before


WRONG = {  # overrides, and the difference in the error
    "another seed of the views": (["augment.seed=1"], "augment.seed: 0 -> 1"),
    "fewer views": (["augment.views=2"], "shape: [3, 64, 100] -> [2, 64, 100]"),
    "another augmentation": (["augment.crop_padding=4"], "augment.crop_padding: 2 -> 4"),
    "another transform": (["augment.affine.degrees=15"], "augment.affine: None -> {'degrees': 15"),
    "another precision": (["run.precision=bf16"], "precision: fp32 -> bf16"),
}


def test_cache_depends_on_the_rows_of_mixed_images_and_on_nothing_else(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, middle_data: Path
) -> None:
    """Partners are training rows, so a subset changes mixed images. No image depends on a label."""
    teacher("big")
    noise = "data.label_noise={kind: symmetric, rate: 0.4}"
    subsets = {
        "data.fraction=0.5": "augment.fraction: None -> 0.5",
        "data.long_tail.imbalance=2": "augment.long_tail: None -> 2.0",
    }
    for name, mixup in (("mixed", 0.4), ("plain", 0)):
        sections = cached("big", views=1, mixup=mixup)
        path = recipe(name, **sections, data={"path": str(middle_data)}, run={"epochs": 1})
        folders: dict[str, Path] = {}
        for change in ("name=a", noise, *subsets):
            folders[change] = tmp_path / f"{name}_{len(folders)}"
            cache(path, change, f"teacher.cache={folders[change]}", cwd=tmp_path)
        original = folders["name=a"]
        expected = (original / "logits.npy").read_bytes()
        assert (folders[noise] / "logits.npy").read_bytes() == expected
        assert "is complete" in cache(path, noise, f"teacher.cache={original}", cwd=tmp_path)
        for change, difference in subsets.items():
            same = (folders[change] / "logits.npy").read_bytes() == expected
            assert same == (name == "plain")
            words = [path, change, f"teacher.cache={original}"]
            output = cache(*words, cwd=tmp_path, expect=0 if same else 2)
            assert ("is complete" if same else difference) in output
    words = ["data.fraction=0.5", f"teacher.cache={tmp_path / 'mixed_0'}"]
    assert "fraction" in train(tmp_path / "mixed.yaml", *words, cwd=tmp_path, expect=2)


def test_cache_with_another_fingerprint_is_an_error_before_the_first_step(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    middle_data: Path,
) -> None:
    teacher("big")
    path = recipe(**cached("big"))
    assert "no cache of a teacher's logits" in train(path, cwd=tmp_path, expect=2)
    cache(path, cwd=tmp_path)
    folder = tmp_path / "runs/big/logits"
    before = content(folder)
    data = f"data.path={middle_data}"
    for overrides, difference in [*WRONG.values(), ([data], "data: ")]:
        for command in (train, cache):
            output = command(path, *overrides, cwd=tmp_path, expect=2)
            assert difference in output
            assert "Traceback" not in output
    teacher("big", seed=1)
    assert "teacher: " in train(path, cwd=tmp_path, expect=2)
    assert content(folder) == before
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()
    cache(path, "--force", cwd=tmp_path)
    assert content(folder) != before
    train(path, cwd=tmp_path)


def swap_rows(path: Path) -> None:
    logits = numpy.load(path)
    logits[:, [3, 4]] = logits[:, [4, 3]]
    numpy.save(path, logits)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: swap_rows(folder / "logits.npy"),
        lambda folder: truncate(folder / "logits.npy"),
        lambda folder: (folder / "logits.npy").unlink(),
        lambda folder: (folder / "logits.npy").write_bytes(b""),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=[
        "permuted",
        "truncated",
        "deleted",
        "empty",
        "no JSON",
        "a list",
        "an empty object",
        "no manifest",
        "no folder",
    ],
)
def test_damaged_cache_is_an_error(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    damage: Any,
) -> None:
    teacher("big")
    path = recipe(**cached("big"))
    cache(path, cwd=tmp_path)
    damage(tmp_path / "runs/big/logits")
    output = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert "Traceback" not in output
    assert output.count("error:") == 1
    assert "cache_logits" in output or "create the cache again" in output
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_folder_that_is_no_cache_is_never_replaced(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    teacher("big")
    path = recipe(**cached("big"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    output = cache(path, "teacher.cache=mine", "--force", cwd=tmp_path, expect=2)
    assert "no cache" in output
    assert (tmp_path / "mine/thesis.tex").read_text() == "precious"
    output = cache(path, "teacher.placement=replicated", cwd=tmp_path, expect=2)
    assert "no teacher to cache" in output
    output = cache(path, "data.path=gone", cwd=tmp_path, expect=2)
    assert f"there is no data in {tmp_path / 'gone'}; set data.path=FOLDER" in output


def test_logits_beyond_float16_are_an_error(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "big", (1, 2, 3), {"teacher": "a"}, force=False)
    with pytest.raises(ValueError, match="float16"):
        writer.append(torch.tensor([[0.0, 70_000.0, 1.0]]).half())
    writer.append(torch.zeros(2, 3).half())
    writer.finish()
    check_cache(tmp_path / "big", {"teacher": "a"})
    assert open_logits(tmp_path / "big").shape == (1, 2, 3)


@pytest.mark.parametrize("moment", ["before the renames", "between the renames"])
def test_forced_cache_replaces_the_old_one_only_when_complete(tmp_path: Path, moment: str) -> None:
    """After a kill at any moment, a reader finds a complete cache and the next start finishes."""
    folder = tmp_path / "big"

    def write(value: float, *, force: bool) -> CacheWriter:
        writer = CacheWriter(folder, (1, 2, 3), {"teacher": str(value)}, force=force)
        writer.append(torch.full((2, 3), value).half())
        return writer

    write(1, force=False).finish()
    second = write(2, force=True)
    second.save()
    check_cache(folder, {"teacher": "1"})
    if moment == "between the renames":
        os.rename(folder, tmp_path / "big.old")
        restarted = CacheWriter(folder, (1, 2, 3), {"teacher": "2"}, force=False)
        assert restarted.rows == 2
        restarted.finish()
    else:
        second.finish()
    check_cache(folder, {"teacher": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]
    assert sorted(path.name for path in folder.iterdir()) == ["logits.npy", "manifest.json"]


def test_caching_without_augment_views_is_an_error(recipe: RecipeMaker) -> None:
    with pytest.raises(ValueError, match=r"augment\.views"):
        load_recipe(recipe(**cached("big", views=None)))
