"""Around the steps: from the start of the process to the first of them, the data, a checkpoint."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from measure import Conditions, Measured, Turn, Work, cpu_seconds
from ours import CROP_FLIP, OPTIM, our_batches, our_model, our_step
from torch import nn
from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

from cifar_dist.data.arrow import class_names, load_split, read_split
from cifar_dist.data.augment import Augment
from cifar_dist.engine.metrics import Window
from cifar_dist.engine.runtime import Ranks
from cifar_dist.engine.state import State
from cifar_dist.engine.step import make_scaler
from cifar_dist.files import write_json
from cifar_dist.learn.losses import CrossEntropy
from cifar_dist.learn.objective import Objective
from cifar_dist.learn.optim import build_optimizer
from cifar_dist.nets.backbones import ModelConfig

PEER_START = Path(__file__).with_name("peer_start.py")
HEAVY = ("albumentations", "cv2", "datasets", "pandas", "wandb", "pydantic")
IMPORTS = ("torch", "torch, timm", "accelerate", "datasets", "albumentations", "cifar_dist.train")
STANDS_STILL = ", the loop stands still"


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


def data_ready(conditions: Conditions) -> Measured:
    """Both splits from files in the page cache to arrays in memory; a unit is an opening."""
    data = conditions.data

    def ours() -> int:
        for name in ("train", "test"):
            load_split(data, name, conditions.device)
        return 1

    with tempfile.TemporaryDirectory() as folder:
        pickles = pickles_of(data, Path(folder))

        def tutorial() -> int:
            for name in ("train", "test"):
                with (pickles / name).open("rb") as file:
                    content = pickle.load(file, encoding="bytes")
                content[b"data"].reshape(-1, 3, 32, 32)
            return 1

        def torchvision() -> int:
            for train in (True, False):
                AnyCifar100(folder, train=train)
            return 1

        works = {"pickle.load": tutorial, "torchvision CIFAR100": torchvision, "ours": ours}
        return Measured(unit="openings", turns=conditions.turns(works), facts={})


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
                    "report_every_steps": 1,
                    "output": str(folder / "runs"),
                },
                "data": {"path": str(conditions.data.absolute())},
                "augment": {"crop_padding": 4, "flip": True},
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


def process(*words: object) -> Work:
    def run() -> int:
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
        return 1

    return run


def until_a_loss(folder: Path, *words: object) -> Work:
    """A Python process until it prints its first loss, then killed; each begins from nothing."""

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=folder) as cwd:
            command = [sys.executable, *map(str, words)]
            if "cifar_dist.train" in command:
                command.append(f"run.output={cwd}")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    """A network and AdamW to disk, by the clock until all is there; a unit is a checkpoint.

    Rows "the loop stands still" count until the next step could begin. Ours are hashed and synced.
    """
    accelerator, device = conditions.accelerator, conditions.device
    split = load_split(conditions.data, "train", device)
    model = our_model(device, ModelConfig(backbone=conditions.backbone))
    optimizer = build_optimizer(OPTIM, model)
    objective = Objective(Augment(CROP_FLIP, split), {"cross_entropy": CrossEntropy()})
    update = our_step(model, objective, optimizer, accelerator, precision="bf16")
    update(next(our_batches(split)), step=0)  # AdamW has its moments
    state = State(
        model=model,
        optimizer=optimizer,
        scaler=make_scaler("bf16", device),
        ema=None,
        window=Window(objective.names, shards=1, device=device),
    )
    accelerator.free_memory()  # of what our step has shown it
    prepared = accelerator.prepare(nn.Sequential(model), optimizer)  # knows them by now
    turns: dict[str, list[Turn]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def ours() -> float:
            state.step += 1
            state.save(folder / "ours", Ranks(0, 1, None), keep=2, facts={})
            still = time.perf_counter()
            final = folder / "ours" / f"step_{state.step:08d}"
            while not final.exists():  # complete or absent
                time.sleep(0.001)
            return still

        def accelerate() -> float:
            accelerator.save_state(str(folder / "accelerate"))
            return time.perf_counter()

        def torch_save() -> float:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content, folder / "checkpoint.pt")
            return time.perf_counter()

        saves: dict[str, Callable[[], float]] = {
            "torch.save": torch_save,
            "accelerator.save_state": accelerate,
            "ours": ours,
        }
        for counted in range(-1, conditions.rounds):
            for row, save in saves.items():
                clock, cpu = time.perf_counter(), cpu_seconds()
                still = save()
                elapsed, used = time.perf_counter() - clock, cpu_seconds() - cpu
                if counted >= 0:
                    turns.setdefault(row, []).append(Turn(1 / elapsed, 1 / used))
                    stands = 1 / (still - clock)
                    turns.setdefault(row + STANDS_STILL, []).append(Turn(stands, 1 / used))
    assert prepared is not None
    accelerator.free_memory()
    parameters: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    return Measured(unit="checkpoints", turns=turns, facts=parameters)
