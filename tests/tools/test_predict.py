"""Tests of the `predict` command: image files, folders, rows of a split, calibration."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from launcher import Launch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from cifar_dist import report
from cifar_dist.data.dataset import OFFICIAL_DIGEST, load_split
from cifar_dist.data.image_files import SUFFIXES, read_image
from cifar_dist.evaluation.scores import choose_temperature
from cifar_dist.inference.prediction import find_images
from cifar_dist.predict import main
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.runs import training_data
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log


def predictions(run: Path, *arguments: str) -> list[dict[str, Any]]:
    output = run / "p.json"
    assert main([str(run), *arguments, "--json", str(output)]) == 0
    return json.loads(output.read_text())


def top_labels(prediction: dict[str, Any]) -> list[str]:
    return [score["label"] for score in prediction["scores"]]


def test_rows_match_the_stored_predictions(run: Path, tmp_path: Path) -> None:
    stored = load_file(run / "predictions.safetensors")
    plain = predictions(run, "--rows", "test", "--save-image", str(tmp_path / "p.png"))
    best = stored["logits"].double().softmax(1).topk(5)
    for row, prediction in enumerate(plain):
        assert prediction["image"] == f"test:{row}"
        values = [score["probability"] for score in prediction["scores"]]
        assert values == pytest.approx(best.values[row].tolist(), abs=1e-5)
    assert Image.open(tmp_path / "p.png").size[0] > 900

    launch = Launch("evaluate", ["runs/tiny"], cwd=tmp_path)
    assert launch.wait() == [0], launch.output
    val = load_file(run / "evaluation/val_predictions.safetensors")
    temperature = choose_temperature(val["logits"], val["labels"])
    (prediction,) = predictions(run, "--rows", "test:7")
    calibrated = (stored["logits"][7].double() / temperature).softmax(0).max()
    assert prediction["scores"][0]["probability"] == pytest.approx(float(calibrated), abs=1e-5)
    assert len(predictions(run, "--rows", "train:5-9")) == 5


def test_temperature_and_its_reason_are_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--rows", "test:0"]
    assert main(arguments) == 0
    assert "probabilities are not calibrated" in capsys.readouterr().out
    launch = Launch("evaluate", ["runs/tiny"], cwd=tmp_path)
    assert launch.wait() == [0], launch.output
    path = run / "evaluation/evaluation.json"
    content = json.loads(path.read_text())
    for value, note in (
        (0.5, "temperature 0.500 (least loss on the validation rows)"),
        (1.0, "temperature 1 (that of least loss calibrates the validation rows worse)"),
    ):
        path.write_text(
            json.dumps(content | {"temperature": content["temperature"] | {"value": value}})
        )
        assert main(arguments) == 0
        assert f"probabilities at {note}\n" in capsys.readouterr().out
        page = tmp_path / "page.html"
        assert report.main([str(run), "--output", str(page)]) == 0
        capsys.readouterr()
        assert page.read_text().count(note) == 1


def test_training_data_other_than_cifar_100_are_named(
    run: Path, tmp_path: Path, middle_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic, page = tmp_path / "synthetic", tmp_path / "page.html"
    shutil.copytree(middle_data, synthetic)
    digest = synthetic / "digest.json"
    digest.write_text(digest.read_text().replace('"other"', '"sample"'))
    for data, what in (
        (middle_data, "other data"),
        (synthetic, "synthetic data, not CIFAR-100"),
    ):
        assert main([str(run), "--rows", "test:0", "--data", str(data)]) == 0
        assert f"{run} was trained on {what}\n" in capsys.readouterr().out
        assert report.main([str(run), "--output", str(page), "--data", str(data)]) == 0
        assert f"Trained on {what}." in page.read_text()

    recipe, environment = load_recipe(run / "recipe.yaml"), {"data": OFFICIAL_DIGEST}
    assert training_data(recipe, environment, tmp_path / "absent") == "CIFAR-100"
    assert training_data(recipe, {"data": "a"}, middle_data).startswith("other data")
    debug = replace(recipe, data=replace(recipe.data, source="sample"))
    assert training_data(debug, {"data": "a"}, tmp_path / "absent").startswith("synthetic data")
    assert training_data(recipe, {}, middle_data) == "unknown data"


def test_files_and_rows_give_the_same_predictions(run: Path, middle_data: Path) -> None:
    images = load_split(middle_data, "test").images
    folder = run / "images"
    (folder / "inner").mkdir(parents=True)
    for row in range(3):
        Image.fromarray(images[row].permute(1, 2, 0).numpy()).save(folder / f"inner/{row}.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    files = predictions(run, str(folder))
    rows = predictions(run, "--rows", "test:0-2")
    assert [Path(file["image"]).name for file in files] == ["0.png", "1.png", "2.png"]
    assert [top_labels(file) for file in files] == [top_labels(row) for row in rows]


def test_images_of_any_size_and_mode_become_32_px(tmp_path: Path) -> None:
    red = (200, 10, 10)
    for name, image in {
        "wide.jpg": Image.new("RGB", (900, 31), red),
        "one.png": Image.new("RGB", (1, 1), red),
        "grey.png": Image.new("L", (50, 50), 100),
        "palette.gif": Image.new("RGB", (40, 60), red).convert("P"),
        "print.jpg": Image.new("RGB", (40, 40), red).convert("CMYK"),
        "bits.png": Image.new("1", (40, 40), 1),
    }.items():
        image.save(tmp_path / name)
        assert read_image(tmp_path / name, 32).shape == (3, 32, 32)
    assert read_image(tmp_path / "print.jpg", 32).mean((1, 2)).tolist() == pytest.approx(red, abs=5)
    assert (read_image(tmp_path / "bits.png", 32) == 255).all()
    Image.fromarray(numpy.full((20, 20), 40000, numpy.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 32) == 40000 // 256).all()
    Image.fromarray(numpy.full((20, 20), 0.5, numpy.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="the value range of 32 bits per pixel is undefined"):
        read_image(tmp_path / "float.tif", 32)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 32) == 255).all()  # on white
    sideways = Image.new("RGB", (64, 64), "white")
    sideways.paste((0, 0, 0), (0, 0, 64, 32))  # upper half black
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    sideways.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 32).mean((0, 1))
    assert turned[:10].mean() > 200 > 50 > turned[-10:].mean()


def test_suffixes_of_images_in_folders_are_documented(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.JPE", "c.ico", "d.pgm", "e.pdf"):
        Image.new("L", (40, 40)).save(tmp_path / name)
    names = [Path(name).name for name in find_images([tmp_path], 32)]
    assert names == ["a.jfif", "b.JPE", "c.ico", "d.pgm"]
    page = " ".join((Path(__file__).parents[2] / "docs/insight.md").read_text().split())
    assert f"files with the suffix {', '.join(sorted(SUFFIXES))}." in page


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    """Also with links to a parent, to a folder that was searched before, and to nothing."""
    for name in ("images", "other/inner"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "one.png")
    links = {"a_link": "other", "b_same": "other/inner", "up": ".", "c_absent": "absent"}
    for name, target in links.items():
        (tmp_path / "images" / name).symlink_to(tmp_path / target)
    found = [
        Path(name).relative_to(tmp_path / "images")
        for name in find_images([tmp_path / "images"], 32)
    ]
    assert [str(path) for path in found] == ["a_link/inner/one.png", "one.png"]


def test_unreadable_image_in_a_folder_is_skipped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(log, "warning", warned.append)
    turned = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")
    wrong = struct.pack("<HHI4s", 0x0103, 2, 3, b"ab\0\0")  # text instead of a number
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + wrong + bytes(4)
    Image.new("RGB", (40, 40)).save(tmp_path / "broken.jpg", exif=exif)
    Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    assert list(find_images([tmp_path], 32)) == [str(tmp_path / "fine.png")]
    (sentence,) = warned
    assert "broken.jpg cannot be read as an image (required argument is not an" in sentence

    def full(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "fit", full)
    with pytest.raises(UserError, match=r"fine\.png cannot be read as an image \(MemoryError\)"):
        read_image(tmp_path / "fine.png", 32)


def test_wrong_arguments_are_refused_with_a_remedy(run: Path, tmp_path: Path) -> None:
    for arguments, message in {
        (): "give either image files or --rows",
        ("a.png", "--rows", "test"): "give either image files or --rows",
        ("absent.png",): r"cannot be read as an image \(No such file or directory\)",
        ("--rows", "test:5-3"): "has rows 0 to",
        ("--rows", "valid:0"): "write test:0-99",
        ("--rows", "test:300"): "has rows 0 to 299",
        ("--rows", "test:0", "--checkpoint", "step_1"): "it has: step_000000",
    }.items():
        with pytest.raises(UserError, match=message):
            main([str(run), *arguments])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (14_000, 14_000)).save(bomb)
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(bomb, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable image in these folders"):
        find_images([tmp_path / "empty"], 32)
