"""Cached logits are those of the live teacher, rounded to float16; a wrong cache is refused."""

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
from launcher import Ranks, train

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import load_split
from cifar_dist.distill.logit_cache import CacheWriter, check_cache, open_logits, partial_path
from cifar_dist.distill.teacher import CachedTeacher, build_teacher
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.teachers import find_teacher
from recipes import RecipeMaker, TeacherMaker, taught

VIEWS = {"crop_padding": 2, "hflip": True, "cutout": 0, "mixup": 0, "cutmix": 0, "views": 3}
CPU = torch.device("cpu")


def cache(*arguments: object, cwd: Path, world_size: int = 1, expect: int = 0) -> str:
    ranks = Ranks("cache_logits", arguments, cwd=cwd, world_size=world_size)
    codes = ranks.wait()
    assert codes == [expect] * world_size, f"exit codes {codes}:\n{ranks.output}"
    return ranks.output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cached(*names: str, **augment: Any) -> dict[str, Any]:
    return taught(*names, placement="cached") | {"augment": VIEWS | augment}


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"cutout": 8, "mixup": 0.4, "cutmix": 1.0, "rand_augment": {}},
        {"views": "all"},
        {"repeated": 2},
    ],
    ids=["crop and flip", "holes, partners and policies", "all views", "copies"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_says_what_the_live_teacher_says(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    augment: dict[str, Any],
    precision: str,
) -> None:
    """In any batch of any epoch: within float16's half unit in the last place.

    2^-11 of a logit, and 2^-25 near zero. In fp32 a live forward of other rows differs by a rounding
    of its own, 1e-5 here; in bf16 one flips at most a bit of bfloat16.
    """
    teacher("big", backbone="test_vit", image_size=48)
    path = recipe(**cached("big", **augment), run={"precision": precision})
    cache(path, cwd=tmp_path)
    made = load_recipe(path)
    split = load_split(Path(made.data.path), "train")
    folder = tmp_path / "runs/big"
    asked = load_recipe(
        path, [f"teacher.run={folder}", "teacher.placement=replicated"]
    ).all_teachers
    live = build_teacher(
        asked, [find_teacher(asked[0])], num_classes=100, device=CPU, mesh=lambda over: None
    )
    assert live is not None
    says = CachedTeacher(open_logits(folder / "logits"))
    show = Augment(made.augment, split)
    for epoch, rows in enumerate([range(64), [5], range(40, 3, -1), [7, 7], range(20)]):
        copies = torch.arange(len(rows)) % 2 if made.augment.repeated == 2 else None
        batch = gather_batch(
            split, torch.tensor(list(rows)), epoch=epoch, micro_batch=0, copies=copies
        )
        view = show(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = live(view, batch)
        found = says(view, batch)
        assert found.dtype == torch.float32
        slack = 1e-5 if precision == "fp32" else 0.02
        assert ((found - expected).abs() <= 2**-11 * expected.abs() + slack).all()
        if (
            epoch == 0 and made.augment.views != "all" and copies is None
        ):  # the very block that was written down
            assert torch.equal(found, expected.half().float())
    assert len(says.logits.unique(dim=0)) > len(says.logits) / 2


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.fault)])
def test_training_from_a_cache_is_training_from_the_teacher(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    precision: str,
) -> None:
    """24 steps at a small learning rate on two ranks: each logged number to 2e-3 of its size."""
    teacher("big", image_size=48)
    teacher("cosines", head="cosine", losses={"arcface": {"scale": 20}})
    path = recipe(
        **cached("big", "cosines"),
        run={"precision": precision, "log_every_steps": 1},
        optim={"lr": 1e-5},
    )
    cache(path, cwd=tmp_path, world_size=2)
    train(path, "name=cached", cwd=tmp_path, world_size=2)
    content_of = yaml.safe_load(path.read_text())
    for each in content_of["teachers"]:
        each["placement"] = "sharded"
    path.write_text(yaml.safe_dump(content_of))
    train(path, "name=sharded", cwd=tmp_path, world_size=2)
    pairs = zip(lines(tmp_path / "runs/cached"), lines(tmp_path / "runs/sharded"), strict=True)
    for ours, theirs in pairs:
        for name in ("loss", "distill", "cross_entropy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name
    assert lines(tmp_path / "runs/cached")[-1]["step"] == 24


def test_a_kill_and_other_processes_leave_the_same_bytes(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    """162 blocks: TERM to two, kill -9 to one that is further on, three go on, sharded."""
    teacher("big", backbone="test_vit", image_size=96)
    path = recipe(**cached("big", crop_padding=4, views="all"))
    folder = tmp_path / "runs/big/logits"
    cache(path, f"teacher.cache={tmp_path / 'whole'}", cwd=tmp_path)

    def wait_for_rows(ranks: Ranks, rows: int) -> None:
        file, deadline = partial_path(folder) / "logits.npy", time.monotonic() + 60
        while not file.exists() or file.stat().st_size < 128 + rows * 200:
            assert any(process.is_alive() for process in ranks.processes), ranks.output
            assert time.monotonic() < deadline
            time.sleep(0.01)

    ranks = Ranks("cache_logits", [path], cwd=tmp_path, world_size=2)
    wait_for_rows(ranks, 64 * 20)
    os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output
    assert "start it again to go on" in ranks.output
    saved = json.loads((partial_path(folder) / "progress.json").read_text())["rows"]
    assert 64 * 20 <= saved < 64 * 162
    refusal = train(path, cwd=tmp_path, expect=2)
    assert "not finished" in refusal
    ranks = Ranks("cache_logits", [path], cwd=tmp_path)
    wait_for_rows(ranks, saved + 64 * 20)
    ranks.kill()
    assert not folder.exists()
    kept = json.loads((partial_path(folder) / "progress.json").read_text())["rows"]
    assert kept >= saved  # more where a slow machine took SAFE_SECONDS before the kill
    output = cache(path, "--sharded", cwd=tmp_path, world_size=3)
    assert f"goes on after {kept:,}" in output
    assert content(folder) == content(tmp_path / "whole")
    assert not partial_path(folder).exists()
    assert "is complete" in cache(path, cwd=tmp_path)
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "checkpoints",
        "logits",
        "recipe.yaml",
    ]


def test_seeds_of_the_student_share_a_cache(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    teacher("big")
    path = recipe(**cached("big"), run={"epochs": 1})
    cache(path, cwd=tmp_path)
    before = content(tmp_path / "runs/big/logits")
    for changes in (["run.seed=1"], ["optim.lr=0.1", "losses.distill.temperature=1"]):
        train(path, f"name=other{len(changes)}", *changes, cwd=tmp_path)
        assert "is complete" in cache(path, *changes, cwd=tmp_path)
    assert content(tmp_path / "runs/big/logits") == before


WRONG = {  # what is changed, and what the refusal names
    "another seed of the views": (["augment.seed=1"], "augment.seed: 0 -> 1"),
    "fewer views": (["augment.views=2"], "shape: [3, 64, 100] -> [2, 64, 100]"),
    "another augmentation": (["augment.crop_padding=4"], "augment.crop_padding: 2 -> 4"),
    "another change": (["augment.affine.degrees=15"], "augment.affine: None -> {'degrees': 15"),
    "another precision": (["run.precision=bf16"], "precision: fp32 -> bf16"),
}


def test_a_cache_of_something_else_is_refused_before_the_first_step(
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
    for changes, named in [*WRONG.values(), ([data], "data: ")]:
        for command in (train, cache):
            said = command(path, *changes, cwd=tmp_path, expect=2)
            assert named in said
            assert "Traceback" not in said
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


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: swap_rows(folder / "logits.npy"),
        lambda folder: cut(folder / "logits.npy"),
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
        "cut",
        "lost",
        "empty",
        "no JSON",
        "a list",
        "no words",
        "no manifest",
        "gone",
    ],
)
def test_a_damaged_cache_is_refused(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
    harm: Any,
) -> None:
    teacher("big")
    path = recipe(**cached("big"))
    cache(path, cwd=tmp_path)
    harm(tmp_path / "runs/big/logits")
    said = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert "cache_logits" in said or "make the cache again" in said
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_a_folder_that_is_no_cache_is_never_replaced(
    tmp_path: Path,
    recipe: RecipeMaker,
    teacher: TeacherMaker,
) -> None:
    teacher("big")
    path = recipe(**cached("big"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    said = cache(path, "teacher.cache=mine", "--force", cwd=tmp_path, expect=2)
    assert "no cache" in said
    assert (tmp_path / "mine/thesis.tex").read_text() == "precious"
    said = cache(path, "teacher.placement=replicated", cwd=tmp_path, expect=2)
    assert "no teacher to cache" in said


def test_logits_that_do_not_fit_float16_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "big", (1, 2, 3), {"teacher": "a"}, force=False)
    with pytest.raises(ValueError, match="float16"):
        writer.append(torch.tensor([[0.0, 70_000.0, 1.0]]).half())
    writer.append(torch.zeros(2, 3).half())
    writer.finish()
    check_cache(tmp_path / "big", {"teacher": "a"})
    assert open_logits(tmp_path / "big").shape == (1, 2, 3)


@pytest.mark.parametrize("moment", ["before the name", "between two names"])
def test_a_forced_cache_replaces_the_old_one_as_a_whole(tmp_path: Path, moment: str) -> None:
    """Whatever moment a kill chooses, the next start finishes and a reader sees one whole cache."""
    folder = tmp_path / "big"

    def make(value: float, *, force: bool) -> CacheWriter:
        writer = CacheWriter(folder, (1, 2, 3), {"teacher": str(value)}, force=force)
        writer.append(torch.full((2, 3), value).half())
        return writer

    make(1, force=False).finish()
    second = make(2, force=True)
    second.save()
    check_cache(folder, {"teacher": "1"})
    if moment == "between two names":
        os.rename(folder, tmp_path / "big.old")
        again = CacheWriter(folder, (1, 2, 3), {"teacher": "2"}, force=False)
        assert again.rows == 2
        again.finish()
    else:
        second.finish()
    check_cache(folder, {"teacher": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]
    assert sorted(path.name for path in folder.iterdir()) == ["logits.npy", "manifest.json"]


def test_a_recipe_without_a_number_of_views_has_no_cache(recipe: RecipeMaker) -> None:
    with pytest.raises(ValueError, match=r"augment\.views"):
        load_recipe(recipe(**cached("big", views=None)))
