"""Around the steps: from the start of the process to the first of them, the data, a checkpoint."""

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
from measure import Conditions, Measured, Turn, Work, cpu_seconds, settle
from ours import CROP_FLIP, OPTIM, our_batches, our_model, our_step
from torch import nn
from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import class_names, load_split, open_splits, read_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.losses.classification import CrossEntropy
from cifar_dist.models.backbones import ModelConfig, num_parameters
from cifar_dist.optim.optimizer import build_optimizer
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.objective import Objective
from cifar_dist.training.state import TrainState
from cifar_dist.utils.files import write_json
from cifar_dist.utils.precision import make_scaler

PEER_START = Path(__file__).with_name("peer_start.py")
HEAVY = ("albumentations", "cv2", "datasets", "pandas", "wandb", "pydantic")
IMPORTS = ("torch", "torch, timm", "accelerate", "datasets", "albumentations", "cifar_dist.train")
AT_HAND = "ours, at hand while the digests are computed"
STANDS_STILL = "ours, until the loop goes on"

Stages = Callable[[], float | None]  # work in two stages: when the first was done; None: it has one


class AnyCifar100(CIFAR100):
    """torchvision's own data set, for pickles with any MD5."""

    train_list = (("train", None),)
    test_list = (("test", None),)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012


class Python2Pickler(pickle._Pickler):  # the one in Python: the other cannot be taught
    """Writes bytes as the strings of Python 2, like the files of CIFAR's author."""

    def save_bytes(self: Any, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar[Any] = pickle._Pickler.dispatch | {bytes: save_bytes}


def pickles_of(data: Path, folder: Path) -> Path:
    """The prepared data as CIFAR's pickles again; the folder of the three files."""
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


def in_stages(
    works: Mapping[str, Stages], *, rounds: int, ours: str, first: str
) -> dict[str, list[Turn]]:
    """One call a turn by turns, as take_turns has it; row `first` is the first stage of row `ours`."""
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


def data_ready(conditions: Conditions) -> Measured:
    """Both splits from files in the page cache to arrays in memory; a unit is an opening."""
    data = conditions.data

    def ours() -> float:
        _, _, check = open_splits(data, conditions.device)
        settle(conditions.device)
        at_hand = time.perf_counter()
        check()
        return at_hand

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
            "ours, checked": ours,
        }
        rounds = 5 * conditions.rounds  # they are short
        turns = in_stages(works, rounds=rounds, ours="ours, checked", first=AT_HAND)
    return Measured(unit="openings", turns=turns, facts={})


def start_up(conditions: Conditions) -> Measured:
    """New processes: imports alone, and all until the first step is done; a unit is a process."""
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
                    "precision": "bf16",
                    "threads": torch.get_num_threads(),
                    "log_every_steps": 1,
                    "output": str(folder / "runs"),
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
        works |= {row: until_a_loss(folder, *words) for row, words in first_step.items()}
        turns = conditions.turns(works, seconds=0)
    script = f"import sys, json, cifar_dist.train; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return Measured(unit="starts", turns=turns, facts={"imported": json.loads(done.stdout)})


def as_many_threads() -> dict[str, str]:
    """The environment of a process that takes as many threads as this one."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def process(*words: object) -> Work:
    def run() -> int:
        command = [sys.executable, *map(str, words)]
        subprocess.run(command, check=True, capture_output=True, env=as_many_threads())
        return 1

    return run


def until_a_loss(folder: Path, *words: object) -> Work:
    """A Python process until it prints its first loss, then killed; each begins from nothing."""

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
                env=as_many_threads(),
            ) as started:
                assert started.stdout is not None
                said = []
                for line in started.stdout:
                    said.append(line)
                    if "loss" in line:
                        break
                else:
                    raise RuntimeError("".join(said))
                started.kill()
        return 1

    return run


def checkpoints(conditions: Conditions) -> Measured:
    """A network and AdamW to disk; a unit is a checkpoint. Ours are hashed and synced."""
    accelerator, device, alone = conditions.accelerator, conditions.device, DistContext(0, 1, None)
    split = load_split(conditions.data, "train", device)
    model = our_model(device, ModelConfig(backbone=conditions.backbone))
    optimizer = build_optimizer(OPTIM, model)
    objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
    update = our_step(model, objective, optimizer, accelerator, precision="bf16")
    update(next(our_batches(split)), step=0)  # AdamW has its moments
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scaler=make_scaler("bf16", device),
        average=None,
        window=MetricWindow(objective.names, micro_batches=1, device=device),
    )
    accelerator.free_memory()  # of what our step has shown it
    accelerator.prepare(nn.Sequential(model), optimizer)  # it saves what it has prepared
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours() -> float:
            state.step += 1
            state.save(folder / "ours", alone, keep=2, metadata={})
            goes_on = time.perf_counter()
            state.finish_saving(alone)
            return goes_on

        def accelerate() -> None:
            accelerator.save_state(str(folder / "accelerate"))

        def torch_save() -> None:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content, folder / "checkpoint.pt")

        works = {"torch.save": torch_save, "accelerator.save_state": accelerate, "ours": ours}
        turns = in_stages(works, rounds=conditions.rounds, ours="ours", first=STANDS_STILL)
    accelerator.free_memory()
    return Measured(unit="checkpoints", turns=turns, facts={"parameters": num_parameters(model)})
