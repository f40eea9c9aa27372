"""The promises hold for images of other sizes than 32 px."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare import assert_same_bits
from launcher import Launch, train
from PIL import Image
from restarts import kill_and_resume
from safetensors.torch import load_file
from small_data import write_sized

from cifar_dist import export, predict, report
from cifar_dist.data.dataset import load_split
from cifar_dist.inference.trained_model import load_trained_model
from recipes import RecipeMaker

AUGMENT = {
    "crop_padding": 4,
    "hflip": True,
    "cutout": 6,
    "rand_augment": {"num_ops": 1},
    "cutmix": 1.0,
    "albumentations": [{"HorizontalFlip": {"p": 0.5}}],
}


@pytest.mark.parametrize(
    "size", [48, *(pytest.param(n, marks=pytest.mark.fault) for n in (16, 33, 64, 96))]
)
def test_same_bits_with_processes_kills_and_commands(
    tmp_path: Path, recipe: RecipeMaker, size: int
) -> None:
    write_sized(tmp_path / "data", size)
    path = recipe(run={"epochs": 2}, data={"path": str(tmp_path / "data")}, augment=AUGMENT)
    output = train(path, "name=straight", cwd=tmp_path)
    assert f"the images have {size} px, the model 32 px" in output or size <= 32
    train(path, "name=host", "augment.workers=0", "data.place=host", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/host")
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/two")
    kill_and_resume(path, tmp_path, [4], last_step=12, world_sizes=[1, 2])
    run = tmp_path / "runs/killed"
    assert_same_bits(tmp_path / "runs/straight", run)
    evaluation = Launch("evaluate", [run], cwd=tmp_path, world_size=2)
    assert evaluation.wait() == [0, 0], evaluation.output
    assert "the same bits as" in evaluation.output

    model = load_trained_model(run)
    assert model.data_size == size
    split = load_split(tmp_path / "data", "test")
    for row in range(3):
        pixels = split.images[row].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
    files = [str(tmp_path / f"{row}.png") for row in range(3)]
    scores = {}
    for name, arguments in {"files": files, "rows": ["--rows", "test:0-2"]}.items():
        assert predict.main([str(run), *arguments, "--json", str(tmp_path / name)]) == 0
        scores[name] = [one["scores"] for one in json.loads((tmp_path / name).read_text())]
    assert scores["files"] == scores["rows"]
    assert report.main([str(run), "--output", str(tmp_path / "page.html")]) == 0


def test_exports_take_images_of_the_data_size(tmp_path: Path, recipe: RecipeMaker) -> None:
    write_sized(tmp_path / "data", 48)
    train(recipe(run={"epochs": 1}, data={"path": str(tmp_path / "data")}), cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    for to in ("onnx", "teacher"):
        options = ["--uint8"] if to == "onnx" else []
        arguments = [str(run), "--to", to, *options, "--output", str(tmp_path / to)]
        assert export.main(arguments) == 0
    config = json.loads((tmp_path / "onnx/config.json").read_text())
    assert config["input"]["shape"] == ["batch", 3, 48, 48]
    assert "uint8 [N, 3, 48, 48]" in (tmp_path / "onnx/README.md").read_text()

    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    images = load_split(tmp_path / "data", "test").images.numpy()
    (logits,) = session.run(["logits"], {"images": images})
    stored = load_file(run / "predictions.safetensors")["logits"].numpy()
    assert abs(logits - stored).max() < 1e-3
    refused = Launch("evaluate", [run, "--corruptions"], cwd=tmp_path)
    assert refused.wait() == [2]
    assert "are defined for images of 32 px, but" in refused.output
