"""Tests of the `export` command: each format is loaded by its own reader and gives the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import yaml
from launcher import train
from safetensors import safe_open
from small_data import small_data
from torch import Tensor, nn

from cifar_dist.data.dataset import data_digest, write_dataset
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.export import main
from cifar_dist.exporting.formats import CHECKED_BATCHES, compare, io_config
from cifar_dist.exporting.model_card import model_card
from cifar_dist.inference.trained_model import load_trained_model
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.models.timm_folder import timm_state
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.run_folder.checkpoint import save_checkpoint, to_cpu
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

RunMaker = Callable[..., Path]
ARCFACE = {"arcface": {"scale": 16.0, "margin": 0.2}}


@pytest.fixture
def make_run(tmp_path: Path, data: Path) -> RunMaker:
    """Return a function that writes a run folder with random BatchNorm statistics."""

    def make(name: str, *, losses: Any = None, ema: bool = False, **model: Any) -> Path:
        config = ModelConfig(**({"backbone": "test_resnet"} | model))
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = {"name": name, "model": json.loads(json.dumps(asdict(config)))}
        recipe |= {"data": {"path": str(data)}, "run": {"precision": "fp32"}}
        recipe |= {"losses": losses or {"cross_entropy": {}}} | ({"averaging": {}} if ema else {})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        tensors = {}
        for number, part in enumerate(["model", *(["average"] if ema else [])]):
            torch.manual_seed(number)
            net = build_model(config, 100)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    for kind, buffer in module.named_buffers():
                        if kind != "num_batches_tracked":
                            nn.init.uniform_(buffer, 0.5, 2)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
            if net.preprocess.filters is not None:
                nn.init.uniform_(net.preprocess.filters, -0.5, 0.5)
            tensors[part] = to_cpu(net.state_dict())
        save_checkpoint(folder / "checkpoints", step=1, tensors=tensors, optimizer={}, progress={})
        return folder

    return make


def random_images(count: int = 5) -> Tensor:
    stream = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=stream)


def export(run: Path, to: str, *options: str) -> Path:
    output = run.parents[1] / "exported" / f"{run.name}_{to}"
    assert main([str(run), "--to", to, "--output", str(output), *options]) == 0
    return output


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"backbone": "test_vit", "image_size": 64},
        {"backbone": "coat_lite_tiny"},
    ],  # tied tensors
    ids=["test_resnet", "test_vit", "coat"],
)
def test_timm_loads_the_folder_with_equal_logits(make_run: RunMaker, model: dict[str, Any]) -> None:
    run = make_run("plain", ema=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.25), **model)
    folder = export(run, "timm")
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    trained = load_trained_model(run)
    images = random_images()
    # Prepare pixels as timm does: scale to [0, 1], resize, normalize with the exported statistics.
    config = timm.data.resolve_model_data_config(net)
    size = trained.recipe.model.image_size
    assert list(config["input_size"]) == [3, size, size]
    pixels = nn.functional.interpolate(
        images.float() / 255, config["input_size"][1:], mode="bilinear", align_corners=False
    )
    pixels = (pixels - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[
        :, None, None
    ]
    with torch.no_grad():
        assert torch.allclose(net(pixels), trained.logits(images), atol=1e-4)
    assert net.pretrained_cfg["label_names"] == list(trained.fine)


@pytest.mark.parametrize("backbone", ["resnetv2_50", "dla34"])
def test_convolutional_classifier_is_exported_as_a_convolution(backbone: str) -> None:
    config = ModelConfig(backbone=backbone)
    ours, theirs = build_model(config, 7).eval(), timm.create_model(backbone, num_classes=7)
    theirs.load_state_dict(timm_state(ours, config))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(
            theirs.eval()(ours.preprocess(images)), ours(images).logits, rtol=1e-4, atol=1e-4
        )


def test_cosine_head_in_timm_keeps_the_ranking(
    make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("cosine", head="cosine", embedding_size=32, losses=ARCFACE)
    folder = export(run, "timm")
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    trained = load_trained_model(run)
    images = random_images(64)
    with torch.no_grad():
        theirs = net(trained.model.preprocess(images))
    ours = trained.logits(images)
    assert torch.equal(theirs.argsort(1), ours.argsort(1))
    assert "not the same probabilities" in capsys.readouterr().out
    assert "not the same probabilities" in (folder / "README.md").read_text()
    assert "Divide the logits" not in (folder / "README.md").read_text()


def test_export_with_different_logits_is_refused() -> None:
    """Refuse differences above rounding at any batch size, and NaN."""
    net, same = nn.Linear(3 * 32 * 32, 100), lambda images: images.flatten(1) / 255
    assert compare(net, net, same, 32) == 0
    assert compare(lambda inputs: net(inputs) + 1e-5, net, same, 32) == pytest.approx(1e-5, rel=0.2)
    for wrong in (
        lambda inputs: net(inputs) + 1e-2,
        lambda inputs: net(inputs) + 1e-2 * (len(inputs) == CHECKED_BATCHES[-1]),
        lambda inputs: net(inputs) * torch.nan,
    ):
        with pytest.raises(UserError, match="differ from the original"):
            compare(wrong, net, same, 32)


def test_config_describes_input_and_output(make_run: RunMaker) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.21, 0.25]
    trained = load_trained_model(make_run("plain", mean=tuple(mean), std=tuple(std), image_size=48))
    config = io_config(replace(trained, temperature=1.5), uint8=False)
    assert config["input"]["mean"] == pytest.approx(mean)
    assert config["input"]["std"] == pytest.approx(std)
    assert config["input"]["shape"] == ["batch", 3, 48, 48]
    assert config["temperature"] == 1.5
    assert config["label_names"] == list(trained.fine)


COSINE = {"head": "cosine", "embedding_size": 32, "losses": ARCFACE, "image_size": 48}


@pytest.mark.parametrize(
    ("to", "uint8", "model"),
    [
        ("onnx", True, COSINE),
        ("onnx", False, COSINE),
        ("pt2", True, COSINE),
        ("pt2", False, {"backbone": "resnet9", "whiten": True}),
    ],
)
def test_onnx_and_pt2_accept_any_batch_size(
    make_run: RunMaker, to: str, uint8: bool, model: dict[str, Any]
) -> None:
    run = make_run("r", **model)
    folder = export(run, to, *(["--uint8"] if uint8 else []))
    trained = load_trained_model(run)
    config = json.loads((folder / "config.json").read_text())
    assert config["input"]["dtype"] == ("uint8" if uint8 else "float32")
    size = trained.recipe.model.image_size
    assert config["input"]["shape"] == ["batch", 3, 32, 32] if uint8 else ["batch", 3, size, size]
    for count in (1, 3, 9):
        images = random_images(count)
        inputs = images
        if not uint8:  # as config.json says
            mean, std = (
                torch.tensor(config["input"][name])[:, None, None] for name in ("mean", "std")
            )
            inputs = nn.functional.interpolate(
                (images / 255 - mean) / std, (size, size), mode=config["input"]["interpolation"]
            )
        if to == "onnx":
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            (outputs,) = session.run(None, {"images": inputs.numpy()})
            logits = torch.from_numpy(outputs)
        else:
            logits = torch.export.load(folder / "model.pt2").module()(inputs)
        assert torch.allclose(logits, trained.logits(images), atol=1e-4)  # includes the scale


def test_exported_teacher_trains_a_student(
    make_run: RunMaker, tmp_path: Path, recipe: RecipeMaker, data: Path
) -> None:
    run = make_run("teacher", head="cosine", embedding_size=32, losses=ARCFACE, ema=True)
    folder = export(run, "teacher")
    by_run, by_folder = (find_teacher(TeacherConfig(run=str(path))) for path in (run, folder))
    assert by_folder.logit_scale == by_run.logit_scale == 16
    assert by_folder.model == by_run.model
    by_file = find_teacher(
        TeacherConfig(run=str(folder / "model.safetensors"), model=by_run.model, logit_scale=16.0)
    )
    assert by_file.digest == by_folder.digest
    student = recipe(
        "student",
        run={"epochs": 1, "precision": "fp32"},
        losses={"cross_entropy": {"weight": 0.3}, "distill": {"weight": 0.7}},
        teacher={"run": str(folder)},
    )
    output = train(student, cwd=tmp_path)
    assert f"teacher {folder}: test_resnet" in output
    with safe_open(
        next((tmp_path / "runs/student/checkpoints").glob("*/model.safetensors")), "pt"
    ) as file:
        assert not any("teacher" in name for name in file.keys())  # noqa: SIM118
    (folder / "cifar_dist.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        find_teacher(TeacherConfig(run=str(folder)))


def test_tied_tensors_are_exported_as_a_teacher(make_run: RunMaker) -> None:
    run = make_run("coat", backbone="coat_lite_tiny")
    by_run, by_folder = (
        find_teacher(TeacherConfig(run=str(path))) for path in (run, export(run, "teacher"))
    )
    assert by_folder.digest == by_run.digest


def test_unsupported_export_is_refused_with_alternatives(make_run: RunMaker) -> None:
    for name, model in {
        "small": {"stem": "small"},
        "own": {"backbone": "resnet8x4"},
    }.items():
        run = make_run(name, **model)
        with pytest.raises(UserError, match="use --to onnx, pt2 or teacher"):
            export(run, "timm")
        assert not list((run.parents[1] / "exported").iterdir())
    with pytest.raises(UserError, match="--uint8 is for onnx and pt2"):
        export(run, "timm", "--uint8")


def test_existing_export_is_kept_unless_forced(make_run: RunMaker) -> None:
    run = make_run("r")
    folder = export(run, "teacher")
    with pytest.raises(UserError, match="--force"):
        export(run, "teacher")
    export(run, "teacher", "--force")
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already exists"):
        export(run, "teacher", "--force")
    assert (folder / "thesis.tex").exists()


def test_model_card_is_valid_and_has_the_metrics(make_run: RunMaker, data: Path) -> None:
    run = make_run("r", ema=True)
    summary = {"top1": 12.345, "top5": 40.0, "loss": 3.2, "steps": 1, "finished": True}
    (run / "summary.json").write_text(json.dumps(summary))
    digest = data_digest(data)
    (run / "environment.json").write_text(json.dumps({"data": digest}))
    card = (export(run, "teacher") / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["image-classification", "test_resnet"]
    assert "datasets" not in yaml.safe_load(header)
    assert "| top-1, % of the test split | 12.35 |" in body or "12.34" in body
    assert digest in body
    assert "averaged weights" in body
    assert "on other data (100 classes)" in body


def test_model_card_of_an_unfinished_run_has_the_metrics_of_its_weights(make_run: RunMaker) -> None:
    run = make_run("r")
    summary = {"top1": 19.6, "steps": 1, "finished": False}  # of an evaluation before
    (run / "summary.json").write_text(json.dumps(summary))
    trained = replace(load_trained_model(run), evaluation={"top1": 32.4, "superclass_top1": 33.2})
    card = model_card(trained, run, to="teacher", uint8=False, check="")
    assert "| top-1, % of the test split | 32.4 |" in card
    assert "19.6" not in card
    assert "of an unfinished training of 200 epochs, at checkpoint\n`step_00000001`" in card


def test_model_card_names_data_resizing_and_temperature(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("small")
    synthetic = tmp_path / "synthetic"
    write_dataset(synthetic, *small_data(), content="sample")
    (run / "environment.json").write_text(json.dumps({"data": data_digest(synthetic)}))
    card = (export(run, "timm", "--data", str(synthetic)) / "README.md").read_text()
    assert "test_resnet at 32 px on synthetic data, not CIFAR-100 (100 classes)" in card
    assert "resize other images to 32 px first." in card
    assert "cifar" not in card.split("---\n")[1].replace("library_name: cifar_dist", "")

    trained = load_trained_model(make_run("large", image_size=48))
    official = replace(trained, trained_on="CIFAR-100")
    for to, uint8, resized in (("timm", False, True), ("onnx", True, False)):
        card = model_card(official, run, to=to, uint8=uint8, check="")
        header = yaml.safe_load(card.split("---\n")[1])
        assert (header["datasets"], "cifar-100" in header["tags"]) == (["cifar100"], True)
        assert "test_resnet at 48 px on CIFAR-100 (100 classes)" in card
        assert ("first, then resize them to 48 px" in card) is resized
    for value, stated in ((1.5, True), (1.0, False)):
        card = model_card(replace(trained, temperature=value), run, to="pt2", uint8=True, check="")
        assert ("Divide the logits by 1.5000 for probabilities with" in card) is stated
        assert "alibrated" not in card
