"""Floor 5. A trained run -> a folder that others load: written, loaded again, compared, then kept."""

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

from cifar_dist.exporting.model_card import model_card
from cifar_dist.inference.trained_model import TrainedModel
from cifar_dist.models.backbones import build_model
from cifar_dist.models.timm_folder import (
    pixel_statistics,
    reload_logits,
    timm_blocker,
    timm_config,
    timm_state,
)
from cifar_dist.recipe.schema import to_dict
from cifar_dist.recipe.teachers import TEACHER_EXPORT
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_folder, atomic_write, write_json
from cifar_dist.utils.random import generator

TOLERANCE = 1e-4  # of a logit, relative to the largest of them
CHECKED_BATCHES = (1, 2, 7)
OURS = {TEACHER_EXPORT, "config.json", "README.md", "model.safetensors", "model.onnx", "model.pt2"}


class FromUint8(nn.Module):
    """uint8 [N, 3, 32, 32] -> f32 [N, C]: the whole model, resizing and normalisation inside."""

    def __init__(self, usable: TrainedModel) -> None:
        super().__init__()
        self.model, self.logit_scale = usable.model, usable.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits * self.logit_scale


class FromFloat(nn.Module):
    """Resized and normalised f32 [N, 3, S, S] -> f32 [N, C]: the network without its first layer."""

    def __init__(self, usable: TrainedModel) -> None:
        super().__init__()
        self.backbone, self.head = usable.model.backbone, usable.model.head
        self.logit_scale = usable.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)).logits * self.logit_scale


def pictures(count: int) -> Tensor:
    """Noise, uint8 [count, 3, 32, 32], the same at each call; to compare two networks with."""
    return torch.randint(
        256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator("export", count)
    )


def network(
    usable: TrainedModel, *, from_bytes: bool
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """What is exported, and what makes its input of uint8 pictures."""
    if from_bytes:
        return FromUint8(usable).eval(), lambda images: images
    return FromFloat(usable).eval(), lambda images: usable.model.preprocess(images).contiguous()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep exporters' own reports off the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def compare(
    exported: Callable[[Tensor], Tensor], net: nn.Module, inputs_of: Callable[[Tensor], Tensor]
) -> float:
    """The largest difference of a logit over batches of several sizes; UserError where it is no rounding."""
    largest = 0.0
    for count in CHECKED_BATCHES:
        inputs = inputs_of(pictures(count))
        wanted, found = net(inputs), exported(inputs)
        apart = float((wanted - found).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise UserError(
                f"the exported network differs from ours by {apart:.2g} in a logit, so it is not "
                "written; try another format with --to"
            )
        largest = max(largest, apart)
    return largest


def to_pt2(usable: TrainedModel, folder: Path, *, from_bytes: bool) -> str:
    net, inputs_of = network(usable, from_bytes=from_bytes)
    with quietly():
        program = torch.export.export(
            net,
            (inputs_of(pictures(2)),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        torch.export.save(program, folder / "model.pt2")
        loaded = torch.export.load(folder / "model.pt2").module()
    apart = compare(loaded, net, inputs_of)
    return f"loaded again by torch.export, its logits differ by at most {apart:.1e}"


def to_onnx(usable: TrainedModel, folder: Path, *, from_bytes: bool) -> str:
    missing = [name for name in ("onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'cifar-dist[export]'")
    import onnxruntime

    net, inputs_of = network(usable, from_bytes=from_bytes)
    with quietly():
        program = torch.onnx.export(
            net,
            (inputs_of(pictures(2)),),
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

    apart = compare(run, net, inputs_of)
    return f"run by onnxruntime {onnxruntime.__version__}, its logits differ by at most {apart:.1e}"


@torch.no_grad()
def to_timm(usable: TrainedModel, folder: Path) -> str:
    config, model = usable.recipe.model, usable.model
    reason = timm_blocker(config)
    if reason:
        raise UserError(
            f"timm cannot rebuild this network: {reason}; use --to onnx, pt2 or teacher"
        )
    atomic_write(folder / "model.safetensors", save(timm_state(model, config)))
    write_json(folder / "config.json", timm_config(model, config, usable.fine))
    images = pictures(32)
    pixels = model.preprocess(images).contiguous()
    found, wanted = reload_logits(folder, pixels), model(images).logits
    if config.head == "linear":
        apart = compare(
            lambda inputs: reload_logits(folder, inputs), *network(usable, from_bytes=False)
        )
        return f"loaded again by timm, its logits differ by at most {apart:.1e}"
    # For each picture all cosines are the linear outputs over one and the same length.
    lengths = (found / wanted).median(1, keepdim=True).values
    apart = float((found / lengths - wanted).abs().max())
    if not apart <= TOLERANCE:
        raise UserError("timm's network ranks the classes otherwise; use --to onnx, pt2 or teacher")
    return (
        "the cosine head became one linear layer: the same ranking of the classes (loaded again by "
        f"timm, cosines differ by at most {apart:.1e}), but not the same probabilities"
    )


@torch.no_grad()
def to_teacher(usable: TrainedModel, folder: Path) -> str:
    state = {name: value.contiguous() for name, value in usable.model.state_dict().items()}
    atomic_write(folder / "model.safetensors", save(state))
    model, scale = to_dict(usable.recipe)["model"], usable.logit_scale
    write_json(folder / TEACHER_EXPORT, {"model": model, "logit_scale": scale})
    again = build_model(
        usable.recipe.model, len(usable.fine), load_file(folder / "model.safetensors")
    )
    images = pictures(7)
    if not torch.equal(again.eval()(images).logits, usable.model(images).logits):
        raise UserError("the model that was read back differs; try again")
    return "loaded again by cifar_dist, its logits are the same bits"


def describe(usable: TrainedModel, *, from_bytes: bool) -> dict[str, Any]:
    """config.json of onnx and pt2: what goes in, what comes out."""
    mean, std = pixel_statistics(usable.model)
    side = usable.recipe.model.image_size
    picture = {"dtype": "uint8", "shape": ["batch", 3, 32, 32]}
    pixels = {"dtype": "float32", "shape": ["batch", 3, side, side], "mean": mean, "std": std}
    pixels["interpolation"] = usable.recipe.model.interpolation
    return {
        "input": {"name": "images"} | (picture if from_bytes else pixels),
        "output": {"name": "logits", "shape": ["batch", len(usable.fine)]},
        "temperature": usable.temperature,
        "label_names": list(usable.fine),
    }


def export(usable: TrainedModel, run: Path, output: Path, *, to: str, from_bytes: bool) -> str:
    """Write the folder, checked, in one step; returns what is to be said about it."""
    usable.model.cpu().to(memory_format=torch.contiguous_format)
    with atomic_folder(output) as folder:
        match to:
            case "timm":
                said = to_timm(usable, folder)
            case "teacher":
                said = to_teacher(usable, folder)
            case "onnx" | "pt2":
                make = to_onnx if to == "onnx" else to_pt2
                said = make(usable, folder, from_bytes=from_bytes)
                write_json(folder / "config.json", describe(usable, from_bytes=from_bytes))
        atomic_write(
            folder / "README.md",
            model_card(usable, run, to=to, from_bytes=from_bytes, said=said),
        )
    return said
