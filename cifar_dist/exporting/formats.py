"""Export a trained run to timm, ONNX, torch.export or a teacher folder.

Each export is loaded again and compared with the original model before the folder is kept.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cifar_dist.data.dataset import classes_digest
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.exporting.model_card import model_card
from cifar_dist.inference.trained_model import TrainedModel
from cifar_dist.models.classifier import build_model
from cifar_dist.models.timm_folder import (
    pixel_statistics,
    reload_logits,
    timm_blocker,
    timm_config,
    timm_state,
)
from cifar_dist.models.weights import unshared
from cifar_dist.recipe.schema import to_dict
from cifar_dist.recipe.teachers import TEACHER_EXPORT
from cifar_dist.run_folder.checkpoint import load_progress
from cifar_dist.run_folder.results import write_predictions
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_folder, atomic_write, sha256, write_json
from cifar_dist.utils.random import generator

TOLERANCE = 1e-4  # of a logit, relative to the largest logit
CHECKED_BATCHES = (1, 2, 7)
EXPORT_FILES = {
    *(TEACHER_EXPORT, "config.json", "README.md"),
    *("model.safetensors", "model.onnx", "model.pt2"),
}
SOUP_FILES = {
    *(TEACHER_EXPORT, "model.safetensors", "README.md"),
    *("ensemble.json", "predictions.safetensors"),
}


class FromUint8(nn.Module):
    """uint8 [N, 3, S, S] -> f32 [N, C]: the whole model, including resizing and normalization."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.model, self.logit_scale = trained.model, trained.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits * self.logit_scale


class FromFloat(nn.Module):
    """Resized, normalized f32 [N, 3, S, S] -> f32 [N, C]: the model without these two."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.model, self.logit_scale = trained.model, trained.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        whitened = self.model.preprocess.whiten(images)
        return self.model.head(self.model.backbone(whitened)).logits * self.logit_scale


def noise_images(count: int, size: int) -> Tensor:
    """Return fixed uint8 noise [count, 3, size, size] on which two networks are compared."""
    return torch.randint(
        256, (count, 3, size, size), dtype=torch.uint8, generator=generator("export", count)
    )


def network(trained: TrainedModel, *, uint8: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the module to export, and a function from uint8 images to its input."""
    if uint8:
        return FromUint8(trained).eval(), lambda images: images
    return FromFloat(trained).eval(), lambda images: trained.model.preprocess.normalize_and_resize(
        images
    ).contiguous()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress the exporters' log messages, warnings and output."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def compare(
    exported: Callable[[Tensor], Tensor],
    original: nn.Module,
    make_input: Callable[[Tensor], Tensor],
    size: int,
) -> float:
    """Return the largest logit difference over several batch sizes; UserError above rounding.

    `make_input` gets uint8 images of `size` px.
    """
    largest = 0.0
    for count in CHECKED_BATCHES:
        inputs = make_input(noise_images(count, size))
        expected, actual = original(inputs), exported(inputs)
        difference = float((expected - actual).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"the logits of the exported network differ from the original by {difference:.2g}, so "
                "it is not written; try another format with --to"
            )
        largest = max(largest, difference)
    return largest


def to_pt2(trained: TrainedModel, folder: Path, *, uint8: bool) -> str:
    net, make_input = network(trained, uint8=uint8)
    with silenced():
        program = torch.export.export(
            net,
            (make_input(noise_images(2, trained.data_size)),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        content = io.BytesIO()  # torch's own writer hides a full disk
        torch.export.save(program, content)
        atomic_write(folder / "model.pt2", content.getvalue())
        loaded = torch.export.load(folder / "model.pt2").module()
    difference = compare(loaded, net, make_input, trained.data_size)
    return f"loaded again with torch.export, its logits differ by at most {difference:.1e}"


def to_onnx(trained: TrainedModel, folder: Path, *, uint8: bool) -> str:
    missing = [name for name in ("onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'cifar-dist[export]'")
    import onnxruntime

    net, make_input = network(trained, uint8=uint8)
    with silenced():
        program = torch.onnx.export(
            net,
            (make_input(noise_images(2, trained.data_size)),),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=["logits"],
        )
        assert program is not None
        program.save(folder / "model.onnx", external_data=False)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": inputs.numpy()})[0])

    difference = compare(run, net, make_input, trained.data_size)
    return (
        f"loaded again with onnxruntime {onnxruntime.__version__}, its logits differ by at most "
        f"{difference:.1e}"
    )


@torch.no_grad()
def to_timm(trained: TrainedModel, folder: Path) -> str:
    config, model = trained.recipe.model, trained.model
    reason = timm_blocker(config)
    if reason:
        raise UserError(
            f"timm cannot rebuild this network: {reason}; use --to onnx, pt2 or teacher"
        )
    atomic_write(folder / "model.safetensors", save(timm_state(model, config)))
    write_json(folder / "config.json", timm_config(model, config, trained.fine))
    if config.head == "linear":
        difference = compare(
            lambda inputs: reload_logits(folder, inputs),
            *network(trained, uint8=False),
            trained.data_size,
        )
        return f"loaded again with timm, its logits differ by at most {difference:.1e}"
    # For each image, the linear outputs are the cosines times the length of its embedding.
    images = noise_images(32, trained.data_size)
    outputs = reload_logits(folder, model.preprocess(images).contiguous())
    cosines = model(images).logits
    lengths = (outputs / cosines).median(1, keepdim=True).values
    difference = float((outputs / lengths - cosines).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            "timm's network ranks the classes differently; use --to onnx, pt2 or teacher"
        )
    return (
        "the cosine head became one linear layer with the same ranking of the classes (loaded again "
        f"with timm, cosines differ by at most {difference:.1e}), but not the same probabilities"
    )


@torch.no_grad()
def to_teacher(trained: TrainedModel, folder: Path) -> str:
    atomic_write(folder / "model.safetensors", save(unshared(trained.model.state_dict())))
    config = {
        "model": to_dict(trained.recipe)["model"],
        "logit_scale": trained.logit_scale,
        "data": load_progress(trained.checkpoint).get("data"),
        "classes": classes_digest(trained.fine),
    }
    write_json(folder / TEACHER_EXPORT, config)
    weights = load_file(folder / "model.safetensors")
    reloaded = build_model(trained.recipe.model, len(trained.fine), weights).eval()
    images = noise_images(7, trained.data_size)
    if not torch.equal(reloaded(images).logits, trained.model(images).logits):
        raise UserError("the reloaded model differs from the original; export it again")
    return "loaded again with cifar_dist, its logits have the same bits"


def io_config(trained: TrainedModel, *, uint8: bool) -> dict[str, Any]:
    """Return the config.json of onnx and pt2: input, output, temperature and class names."""
    model, size = trained.recipe.model, trained.data_size
    image_input: dict[str, Any] = {"dtype": "uint8", "shape": ["batch", 3, size, size]}
    if not uint8:
        mean, std = pixel_statistics(trained.model)
        image_input = {
            "dtype": "float32",
            "shape": ["batch", 3, model.image_size, model.image_size],
            "mean": mean,
            "std": std,
            "interpolation": model.interpolation,
        }
    return {
        "input": {"name": "images"} | image_input,
        "output": {"name": "logits", "shape": ["batch", len(trained.fine)]},
        "temperature": trained.temperature,
        "label_names": list(trained.fine),
    }


def export(trained: TrainedModel, run: Path, output: Path, *, to: str, uint8: bool) -> str:
    """Write the export folder in one step and return a sentence about the comparison."""
    trained.model.cpu().to(memory_format=torch.contiguous_format)
    with atomic_folder(output) as folder:
        match to:
            case "timm":
                check = to_timm(trained, folder)
            case "teacher":
                check = to_teacher(trained, folder)
            case "onnx" | "pt2":
                convert = to_onnx if to == "onnx" else to_pt2
                check = convert(trained, folder, uint8=uint8)
                write_json(folder / "config.json", io_config(trained, uint8=uint8))
        card = model_card(trained, run, to=to, uint8=uint8, check=check)
        atomic_write(folder / "README.md", card)
    return check


def export_soup(
    trained: TrainedModel, test: EvalResult, report: dict[str, Any], output: Path
) -> str:
    """Write what `make_soup` returns as a teacher folder, in one step, and return as `export` does."""
    trained.model.cpu().to(memory_format=torch.contiguous_format)
    with atomic_folder(output) as folder:
        check = to_teacher(trained, folder)
        write_predictions(
            folder / "predictions.safetensors", test, weights=sha256(folder / "model.safetensors")
        )
        write_json(folder / "ensemble.json", report)
        run = trained.checkpoint.parents[1]
        card = model_card(trained, run, to="teacher", uint8=False, check=check, soup=report)
        atomic_write(folder / "README.md", card)
    return check
