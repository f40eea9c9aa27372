"""Time process start-up, data loading and checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from measure import Conditions, Measurement, Turn, Work, cpu_seconds, synchronize
from ours import CROP_FLIP, OPTIM, our_batches, our_model, our_step
from torch import nn
from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import class_names, load_split, open_splits, read_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.classifier import ModelConfig, num_parameters
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.state import TrainState
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import auto_precision, make_scaler

PEER_START = Path(__file__).with_name("peer_start.py")
HEAVY = ("albumentations", "cv2", "datasets", "pandas", "wandb", "pydantic")
IMPORTS = ("torch", "torch, timm", "accelerate", "datasets", "albumentations", "cifar_dist.train")
UNVERIFIED = "ours, before the digests are verified"
BLOCKED = "ours, until training continues"

Stages = Callable[[], float | None]  # work; returns the end of its first stage if it has two


class AnyCifar100(CIFAR100):
    """torchvision's data set without its MD5 checks."""

    train_list = (("train", None),)
    test_list = (("test", None),)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012


class Python2Pickler(pickle._Pickler):  # the C implementation has no dispatch table
    """Write bytes as Python 2 strings, as in the original CIFAR files."""

    def save_bytes(self: Any, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar[Any] = pickle._Pickler.dispatch | {bytes: save_bytes}


def pickles_of(data: Path, folder: Path) -> Path:
    """Write prepared data as the three original pickles and return their folder."""
    fine_names = [name.encode() for name in class_names(data)]
    members: dict[str, dict[bytes, Any]] = {"meta": {b"fine_label_names": fine_names}}
    for name in ("train", "test"):
        raw = read_split(data, name)
        members[name] = {
            b"filenames": [filename.encode() for filename in raw.filenames],
            b"fine_labels": raw.fine_labels.tolist(),
            b"coarse_labels": raw.coarse_labels.tolist(),
            b"data": raw.images,
        }
    pickles = folder / "cifar-100-python"
    pickles.mkdir()
    for name, content in members.items():
        with (pickles / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
    return pickles


def take_turns_in_stages(
    works: Mapping[str, Stages], *, rounds: int, ours: str, first: str
) -> dict[str, list[Turn]]:
    """As take_turns, one call a turn; row `first` times the first stage of row `ours`."""
    turns: dict[str, list[Turn]] = {name: [] for name in (*works, first)}
    for counted in range(-1, rounds):
        for name, work in works.items():
            clock, cpu = time.perf_counter(), cpu_seconds()
            first_done = work()
            elapsed, used = time.perf_counter() - clock, cpu_seconds() - cpu
            if counted >= 0:
                turns[name].append(Turn(1 / elapsed, 1 / used))
            if counted >= 0 and name == ours:
                assert first_done is not None
                turns[first].append(Turn(1 / (first_done - clock), 1 / used))
    return turns


def data_ready(conditions: Conditions) -> Measurement:
    """Load both splits from the page cache into memory; the unit is one load."""
    data = conditions.data

    def ours() -> float:
        _, _, check = open_splits(data, conditions.device)
        synchronize(conditions.device)
        loaded = time.perf_counter()
        check()
        return loaded

    with tempfile.TemporaryDirectory() as folder:
        pickles = pickles_of(data, Path(folder))

        def tutorial() -> None:
            for name in ("train", "test"):
                with (pickles / name).open("rb") as file:
                    content = pickle.load(file, encoding="bytes")
                content[b"data"].reshape(-1, 3, 32, 32)

        def torchvision() -> None:
            for train in (True, False):
                AnyCifar100(folder, train=train)

        works = {
            "pickle.load": tutorial,
            "torchvision CIFAR100": torchvision,
            "ours, digests verified": ours,
        }
        rounds = 5 * conditions.rounds  # the turns are short
        turns = take_turns_in_stages(
            works, rounds=rounds, ours="ours, digests verified", first=UNVERIFIED
        )
    return Measurement(unit="openings", turns=turns, facts={})


def start_up(conditions: Conditions) -> Measurement:
    """Start new processes: imports only, and up to the first step; the unit is a process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pickles = pickles_of(conditions.data, folder)
        recipe = folder / "start.yaml"
        write_json(  # JSON is YAML
            recipe,
            {
                "name": "start",
                "run": {
                    "epochs": 1,
                    "batch_size": 250,
                    "precision": "auto",
                    "threads": torch.get_num_threads(),
                    "log_every_steps": 1,
                    "output_dir": str(folder / "runs"),
                },
                "data": {"path": str(conditions.data.absolute())},
                "augment": {"crop_padding": 4, "hflip": True},
                "losses": {"cross_entropy": {}},
            },
        )
        first_step = {
            "to step 1: torch, timm, the pickles": (PEER_START, "tutorial", pickles),
            "to step 1: Accelerate, datasets": (PEER_START, "hugging_face", conditions.data),
            "to step 1: ours": ("-m", "cifar_dist.train", recipe),
        }
        works = {f"import {names}": process("-c", f"import {names}") for names in IMPORTS}
        works |= {row: run_until_loss(folder, *words) for row, words in first_step.items()}
        turns = conditions.turns(works, seconds=0)
    script = f"import sys, json, cifar_dist.train; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return Measurement(unit="starts", turns=turns, facts={"imported": json.loads(done.stdout)})


def same_threads() -> dict[str, str]:
    """Return the environment of a process with as many threads as this one."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def process(*words: object) -> Work:
    def run() -> int:
        command = [sys.executable, *map(str, words)]
        subprocess.run(command, check=True, capture_output=True, env=same_threads())
        return 1

    return run


def run_until_loss(folder: Path, *words: object) -> Work:
    """Return work that runs Python in a new folder until it prints a loss, then kills it."""

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=folder) as cwd:
            command = [sys.executable, *map(str, words)]
            if "cifar_dist.train" in command:
                command.append(f"run.output_dir={cwd}")
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=same_threads(),
            ) as started:
                assert started.stdout is not None
                output = []
                for line in started.stdout:
                    output.append(line)
                    if "loss" in line:
                        break
                else:
                    raise RuntimeError("".join(output))
                started.kill()
        return 1

    return run


def checkpoints(conditions: Conditions) -> Measurement:
    """Save a network and AdamW; the unit is a checkpoint. Ours are hashed and synced to disk."""
    accelerator, device, context = (
        conditions.accelerator,
        conditions.device,
        DistContext(0, 1, None),
    )
    split = load_split(conditions.data, "train", device)
    precision = auto_precision(device)
    model = our_model(device, ModelConfig(backbone=conditions.backbone))
    optimizer = build_optimizer(OPTIM, model)
    objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
    update = our_step(model, objective, optimizer, accelerator, precision=precision)
    update(next(our_batches(split)), step=0)  # creates the moments of AdamW
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scaler=make_scaler(precision, device),
        average=None,
        window=MetricWindow(objective.names, micro_batches=1, device=device),
    )
    accelerator.free_memory()  # drop what our step has prepared
    accelerator.prepare(nn.Sequential(model), optimizer)  # save_state saves prepared objects
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours() -> float:
            state.step += 1
            state.save(folder / "ours", context, keep=2, metadata={})
            continued = time.perf_counter()
            state.finish_saving(context)
            return continued

        def accelerate() -> None:
            accelerator.save_state(str(folder / "accelerate"))

        def torch_save() -> None:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content, folder / "checkpoint.pt")

        works = {"torch.save": torch_save, "accelerator.save_state": accelerate, "ours": ours}
        turns = take_turns_in_stages(works, rounds=conditions.rounds, ours="ours", first=BLOCKED)
    accelerator.free_memory()
    return Measurement(unit="checkpoints", turns=turns, facts={"parameters": num_parameters(model)})
