"""`prepare --images` and `--dataset PATH`: class folders, saved datasets, Parquet files."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from cifar_dist.data.dataset import class_names, load_split, read_digest, read_split
from cifar_dist.data.image_files import read_image
from cifar_dist.data.ingest.preparation import pixel_statistics
from cifar_dist.prepare import main
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

COLORS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (210, 20, 30)}
Folder = dict[str, Image.Image]


def write(folder: Path, images: Folder) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


def flat(label: str, number: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """Return an image of one color, slightly different for each number."""
    return Image.new("RGB", size, tuple(level + number for level in COLORS[label]))


def class_folders(count: int, prefix: str = "") -> Folder:
    return {
        f"{prefix}{label}/{number:02}.png": flat(label, number)
        for label in COLORS
        for number in range(count)
    }


def prepared(source: Path, output: Path, *options: str, kind: str = "--images") -> dict[str, Any]:
    """Return the filenames of each split."""
    assert main([kind, str(source), "--output", str(output), *options]) == 0
    return {name: read_split(output, name).filenames for name in ("train", "test")}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(log, "warning", messages.append)
    return messages


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val")])
def test_folders_of_both_splits(tmp_path: Path, train: str, test: str) -> None:
    images = class_folders(3, f"{train}/") | class_folders(1, f"{test}/")
    folder = write(tmp_path / "in", images)
    names = prepared(folder, tmp_path / "out")
    assert len(names["train"]) == 9
    assert names["test"] == [f"{label}/00.png" for label in COLORS]
    assert class_names(tmp_path / "out") == ("blue", "green", "red")
    split = load_split(tmp_path / "out", "train")
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row, color in enumerate(COLORS[label] for label in COLORS for _ in range(3)):
        expected = [level + row % 3 for level in color]
        assert split.images[row].flatten(1).unique(dim=1).flatten().tolist() == expected
    assert read_digest(tmp_path / "out")["content"] == "other"


def test_split_is_stratified_and_stable_when_images_are_added(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", class_folders(10))
    first = prepared(folder, tmp_path / "first")
    for label in COLORS:
        assert sum(name.startswith(label) for name in first["test"]) == 2
    assert not set(first["train"]) & set(first["test"])
    write(folder, {f"red/new_{number}.png": flat("red", number) for number in range(5)})
    second = prepared(folder, tmp_path / "second")
    assert [name for name in first["test"] if "red" not in name] == [
        name for name in second["test"] if "red" not in name
    ]
    assert sum(name.startswith("red") for name in second["test"]) == 3
    moved = set(first["test"]) - set(second["test"])
    assert len(moved) <= 1
    half = prepared(folder, tmp_path / "half", "--test-fraction", "0.5")
    assert len(half["test"]) == 5 + 5 + 8


def test_same_images_give_the_same_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", class_folders(4))
    for name in ("a", "b"):
        prepared(folder, tmp_path / name)
    assert read_digest(tmp_path / "a") == read_digest(tmp_path / "b")
    prepared(folder, tmp_path / "a")  # complete: nothing to do
    with pytest.raises(UserError, match="contains other data"):
        prepared(folder, tmp_path / "a", "--size", "16")
    prepared(folder, tmp_path / "a", "--size", "16", "--force")
    assert load_split(tmp_path / "a", "test").images.shape[1:] == (3, 16, 16)


def sideways() -> Image.Image:
    """Return an image whose left half is black, and whose upper half is, once EXIF has turned it."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (0, 0, 32, 64))
    return image


def awkward_files(folder: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate by 90 degrees clockwise
    sideways().save(folder / "turned.jpg", exif=turned)
    Image.new("L", (40, 40), 100).save(folder / "gray.png")
    Image.new("RGB", (40, 40), COLORS["red"]).convert("CMYK").save(folder / "print.jpg")
    frames = [flat("red"), flat("blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("1", (40, 40), 1).save(folder / "bits.png")
    flat("red").convert("P").save(folder / "palette.png")
    flat("red", size=(4000, 30)).save(folder / "wide.jpg", quality=95)
    flat("red", size=(1, 1)).save(folder / "one.bmp")


def test_awkward_files_become_rgb(tmp_path: Path) -> None:
    write(tmp_path / "in", class_folders(1, "train/") | class_folders(1, "test/"))
    awkward_files(tmp_path / "in/train/red")
    names = prepared(tmp_path / "in", tmp_path / "out", "--size", "48")["train"]
    images = load_split(tmp_path / "out", "train").images.float()

    def mean(name: str) -> list[float]:
        return images[names.index(f"red/{name}")].mean((1, 2)).tolist()

    turned = images[names.index("red/turned.jpg")].mean((0, 2))  # by line
    assert turned[:20].max() < 20
    assert turned[-20:].min() > 235
    assert mean("gray.png") == [100, 100, 100]
    assert mean("deep.png") == [40000 // 256] * 3
    assert mean("clear.png") == mean("bits.png") == [255, 255, 255]
    for name in ("animated.gif", "animated.webp", "palette.png", "wide.jpg", "one.bmp"):
        assert mean(name) == pytest.approx(COLORS["red"], abs=3), name
    assert mean("print.jpg") == pytest.approx(COLORS["red"], abs=5)


def damage(folder: Path) -> None:
    """Write files that look like images and are none."""
    whole = io.BytesIO()
    Image.effect_noise((80, 80), 50).save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.gif").write_text("<svg/>")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "float.tif")
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(4)
    (folder / "bomb.png").write_bytes(bomb)


def test_damaged_files_are_named_or_left_out(tmp_path: Path, warnings: list[str]) -> None:
    folder = write(tmp_path / "in", class_folders(2, "train/") | class_folders(1, "test/"))
    damage(folder / "train/green")
    with pytest.raises(UserError) as caught:
        prepared(folder, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("5 of 11 images of train are unreadable: ")
    for name in ("bomb.png", "empty.png", "float.tif", "text.gif", "truncated.jpg"):
        assert f"green/{name} cannot be read as an image (" in message
    assert "save it with 8 or 16 bits)" in message
    assert message.endswith("; remove them, or leave them out with --skip-unreadable")
    assert not (tmp_path / "out").exists()
    names = prepared(folder, tmp_path / "out", "--skip-unreadable")
    assert [name for name in names["train"] if "green" in name] == ["green/00.png", "green/01.png"]
    assert any("left out: 5 of 11" in warning for warning in warnings)


def test_other_files_are_ignored(tmp_path: Path, warnings: list[str]) -> None:
    folder = write(tmp_path / "in", class_folders(2, "train/") | class_folders(1, "test/"))
    (folder / "train/red/notes.txt").write_text("x")
    (folder / "train/red/.DS_Store").write_text("x")
    (folder / "train/red/._00.png").write_text("x")  # as archivers of macOS write them
    (folder / "__MACOSX/train/red").mkdir(parents=True)
    (folder / ".cache").mkdir()
    os.mkfifo(folder / "train/red/pipe.png")  # reading it would wait forever
    (folder / "train/pink").mkdir()
    (folder / "extra/red").mkdir(parents=True)
    assert len(prepared(folder, tmp_path / "out")["train"]) == 6
    assert warnings.pop(0) == f"{folder}/extra is not used, since {folder} has train and test"
    assert warnings.pop(0) == f"{folder}/train/pink has no images, so it is no class"
    assert warnings[0] == f"{folder}/train: files that are no images are ignored: 1 x .txt"
    assert "copies" in warnings[1]
    assert len(warnings) == 2


def test_copies_in_both_splits_are_reported(tmp_path: Path, warnings: list[str]) -> None:
    images = class_folders(2, "train/") | {
        f"test/{label}/x.png": flat(label, label == "red") for label in COLORS
    }
    images["test/blue/x.png"] = flat("blue", 9)
    prepared(write(tmp_path / "in", images), tmp_path / "out")
    assert warnings == ["2 test images are exact copies of training images; remove them"]


def test_unused_splits_are_reported(tmp_path: Path, warnings: list[str]) -> None:
    images = (
        class_folders(2, "train/")
        | class_folders(1, "val/")
        | {f"test/{label}/x.png": flat(label, 9) for label in COLORS}
    )
    prepared(write(tmp_path / "in", images), tmp_path / "out")
    assert warnings == [f"{tmp_path}/in/val is not used, since {tmp_path}/in has train and test"]


def encoded(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(count: int, *, first: int = 0, label: Any = None) -> datasets.Dataset:
    """Return a dataset with `count` images of each class; its ClassLabel orders them otherwise."""
    names = ["red", "green", "blue"]
    rows = [(name, number) for name in names for number in range(first, first + count)]
    features = {"img": datasets.Image(), "kind": label or datasets.ClassLabel(names=names)}
    kinds = [names.index(name) if label is None else name for name, _ in rows]
    columns = {"img": [encoded(flat(*row)) for row in rows], "kind": kinds}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_saved_dataset(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": table(4), "validation": table(2, first=8)})
    saved.save_to_disk(tmp_path / "saved")
    names = prepared(tmp_path / "saved", tmp_path / "out", kind="--dataset")
    assert names["train"] == [f"train/{row}" for row in range(12)]
    assert class_names(tmp_path / "out") == ("red", "green", "blue")
    split = load_split(tmp_path / "out", "test")
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for row, label in enumerate(("red", "red", "green", "green", "blue", "blue")):
        expected = [level + 8 + row % 2 for level in COLORS[label]]
        assert split.images[row, :, 5, 5].tolist() == expected


def test_filtered_dataset_without_splits(tmp_path: Path) -> None:
    table(5).select(range(0, 15, 2)).save_to_disk(tmp_path / "saved")
    names = prepared(tmp_path / "saved", tmp_path / "out", kind="--dataset")
    assert (len(names["train"]), len(names["test"])) == (5, 3)


@pytest.mark.parametrize("layout", ["one file", "folder", "folders of splits"])
def test_parquet_files(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "parquet"
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    match layout:
        case "one file":
            table(5).to_parquet(folder / "all.parquet")
            source = folder / "all.parquet"
        case "folder":
            table(3).to_parquet(folder / "train-00000-of-00002.parquet")
            table(1, first=3).to_parquet(folder / "train-00001-of-00002.parquet")
            table(1, first=8).to_parquet(folder / "test-00000-of-00001.parquet")
            source = folder
        case _:
            table(4).to_parquet(folder / "train/0000.parquet")
            table(1, first=8).to_parquet(folder / "test/0000.parquet")
            source = folder
    names = prepared(source, tmp_path / "out", kind="--dataset")
    assert (len(names["train"]), len(names["test"])) == (12, 3)
    split = load_split(tmp_path / "out", "test")
    assert split.labels.tolist() == [0, 1, 2]
    assert [int(image[0, 0, 0] > 100) for image in split.images] == [1, 0, 0]


def test_texts_and_numbers_as_labels(tmp_path: Path) -> None:
    table(4, label=datasets.Value("string")).to_parquet(tmp_path / "texts.parquet")
    prepared(tmp_path / "texts.parquet", tmp_path / "a", "--label-column", "kind", kind="--dataset")
    assert class_names(tmp_path / "a") == ("blue", "green", "red")
    rows = {"image": [encoded(flat("red", n)) for n in range(24)], "label": [7, 30, 100] * 8}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "numbers.parquet")
    prepared(tmp_path / "numbers.parquet", tmp_path / "b", kind="--dataset")
    assert class_names(tmp_path / "b") == ("7", "30", "100")


def test_mistakes_are_named_with_a_remedy(tmp_path: Path) -> None:
    good = write(tmp_path / "good", class_folders(2))
    alone = write(tmp_path / "alone", {"red/a.png": flat("red"), "red/b.png": flat("red")})
    single = write(tmp_path / "single", class_folders(2) | {"pink/a.png": flat("red")})
    stray = write(tmp_path / "stray", class_folders(2) | {"a.png": flat("red")})
    no_train = write(tmp_path / "no_train", class_folders(2, "test/"))
    unseen = write(
        tmp_path / "unseen", class_folders(2, "train/") | {"test/red/a.png": flat("red")}
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(50))
    table(4, label=datasets.Value("string")).to_parquet(tmp_path / "texts.parquet")
    rows: dict[str, Any] = {"image": [encoded(flat("red"))] * 4, "label": [0, 1, 0, -1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    unlabeled = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    unlabeled.to_parquet(tmp_path / "unlabeled.parquet")
    rows["image"] = [{"bytes": None, "path": "/etc/passwd"}] * 4
    only_paths = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    only_paths.to_parquet(tmp_path / "paths.parquet", storage_options=None)
    cases: dict[tuple[str, ...], str] = {
        ("--images", str(tmp_path / "absent")): "absent does not exist; give an existing path",
        ("--dataset", "cifra10"): r"cifra10 does not exist; did you mean cifar10\?",
        ("--images", str(tmp_path / "empty")): "has neither class folders with images, nor",
        ("--images", str(alone)): r"found 1 class\(es\); a classifier needs at least two",
        ("--images", str(single)): r"class pink has 1 image\(s\); the training and the test",
        ("--images", str(stray)): r"a\.png is in no class folder; move it to",
        ("--images", str(no_train)): "has test, but no folder train",
        ("--images", str(unseen)): "the test split has no images of blue, green; add some",
        ("--images", str(good), "--size", "97"): "--size 97: must be 8 to 96",
        ("--images", str(good), "--size", "0"): "--size 0: must be 8 to 96",
        ("--images", str(good), "--test-fraction", "1"): r"--test-fraction 1\.0: must be between",
        ("--images", str(good), "--source", "x"): "--source: not allowed with argument --images",
        ("--images", str(good), "--dataset", "cifar10"): "--dataset: not allowed with argument",
        ("--dataset", str(good), "--allow-unofficial"): "not allowed with argument --dataset",
        ("--images", ""): "the path is empty",
        ("--dataset", ""): "the path is empty",
        ("--sample", "--size", "16"): "--size: only with --images FOLDER or --dataset PATH",
        ("--dataset", str(tmp_path / "broken.parquet")): r"broken\.parquet cannot be read \(",
        (
            "--dataset",
            str(tmp_path / "texts.parquet"),
        ): "single label column; choose one of img, kind",
        ("--dataset", str(tmp_path / "unlabeled.parquet")): "row 3 of train has the label -1",
        ("--dataset", str(tmp_path / "paths.parquet")): "row 0 of train has no bytes in its column",
        (
            *("--dataset", str(tmp_path / "unlabeled.parquet")),
            *("--image-column", "photo"),
        ): "has no image column photo; choose one of image, label with --image-column",
    }
    for arguments, message in cases.items():
        with pytest.raises(UserError, match=message):
            main([*arguments, "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_parquet_files_must_agree_and_tell_their_split(tmp_path: Path) -> None:
    """Labels are indices into the class names of a file, so other names would be wrong labels."""
    names = ["green", "red", "blue"]
    for folder, files in {
        "other names": ("train-0.parquet", "train-1.parquet"),
        "extra": ("train-0.parquet", "extra-0.parquet"),
        "number": ("train-0.parquet", "test-0.parquet"),
    }.items():
        (tmp_path / folder).mkdir()
        first, second = (tmp_path / folder / file for file in files)
        table(3).to_parquet(first)
        other = table(3, first=5)
        if folder == "other names":
            other = other.cast_column("kind", datasets.Value("int64"))
            other = other.cast_column("kind", datasets.ClassLabel(names=names))
        if folder == "number":
            other = other.cast_column("kind", datasets.Value("float64"))
        other.to_parquet(second)
    for folder, message in {
        "other names": r"train-1\.parquet has other columns or classes than .*train-0\.parquet",
        "extra": r"extra-0\.parquet: the name does not tell the split",
        "number": "has other columns or classes than",
    }.items():
        with pytest.raises(UserError, match=message):
            prepared(tmp_path / folder, tmp_path / "out", kind="--dataset")
    assert not (tmp_path / "out").exists()


def test_unusual_labels_are_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "list": [[0], [1]],
        "struct": [{"a": 1}, {"a": 2}],
        "null": ["a", None],
    }
    for name, labels in values.items():
        rows = {"image": [encoded(flat("red"))] * 2, "label": labels}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / f"{name}.parquet"
        )
        with pytest.raises(UserError, match=r"has the label .*, not a text or a number; remove it"):
            prepared(tmp_path / f"{name}.parquet", tmp_path / "out", kind="--dataset")


def test_printed_name_is_a_valid_recipe_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in {"my flöwers": "my_fl_wers", "2024": "data_2024", "-x": "_x"}.items():
        prepared(write(tmp_path / folder, class_folders(2)), tmp_path / "out" / folder)
        assert f"train quick name={name} data.path=" in capsys.readouterr().out


def test_prepared_data_as_dataset_are_refused(tmp_path: Path) -> None:
    prepared(write(tmp_path / "in", class_folders(3)), tmp_path / "out")
    with pytest.raises(UserError, match=r"was written by prepare already; use it with data\.path="):
        prepared(tmp_path / "out", tmp_path / "again", kind="--dataset")


def test_pixel_statistics_are_exact() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3 * 8 * 8), np.uint8)
    mean, std = pixel_statistics(images)
    values = images.reshape(30, 3, -1) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2)), rtol=1e-12)


def test_damaged_parquet_files_and_other_classes_in_the_test_split(tmp_path: Path) -> None:
    for first, last in (("train", "test"), ("whole", "part")):
        (tmp_path / first).mkdir()
        table(40).to_parquet(tmp_path / first / "train.parquet")
        names = ["blue", "green", "red"]
        other = table(1).cast_column("kind", datasets.Value("int64"))
        other = other.cast_column("kind", datasets.ClassLabel(names=names))
        other.to_parquet(tmp_path / first / f"{last}.parquet")
    with pytest.raises(UserError, match="has other columns or classes than"):
        prepared(tmp_path / "train", tmp_path / "out", kind="--dataset")
    damaged = tmp_path / "whole/train.parquet"
    content = bytearray(damaged.read_bytes())
    content[100:900] = bytes(800)
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet cannot be read|are unreadable"):
        prepared(damaged, tmp_path / "out", kind="--dataset")
    assert not (tmp_path / "out").exists()


def test_postscript_is_not_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start `gs` on a file with this content, whatever its name."""
    bin_folder, started = tmp_path / "bin", tmp_path / "started"
    bin_folder.mkdir()
    (bin_folder / "gs").write_text(f"#!/bin/sh\ntouch '{started}'\n")
    (bin_folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # look it up again
    file = tmp_path / "x.png"
    file.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(file, 32)
    assert not started.exists()


def test_claimed_number_of_rows_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(2).to_parquet(tmp_path / "a.parquet")

    def huge(*arguments: object) -> None:
        raise MemoryError("Unable to allocate 2.00 PiB")

    monkeypatch.setattr("cifar_dist.data.ingest.own_images.decode", huge)
    with pytest.raises(UserError, match=r"cannot be read \(Unable to allocate 2\.00 PiB\)"):
        prepared(tmp_path / "a.parquet", tmp_path / "out", kind="--dataset")
