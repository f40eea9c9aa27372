"""Small data sets on disk, created once per session, and recipes that train on them in seconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launcher import train
from small_data import quick_recipe, small_data

from cifar_dist.data.dataset import write_dataset
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.run_folder.checkpoint import save_checkpoint, to_cpu
from recipes import RecipeMaker, TeacherMaker, write_recipe


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 + 23 rows of synthetic data as Arrow; 23 is a prime."""
    root = tmp_path_factory.mktemp("small") / "data"
    write_dataset(root, *small_data(), content="other")
    return root


@pytest.fixture(scope="session")
def middle_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 + 300 rows, for batches of 250 and more than one block of an evaluation."""
    root = tmp_path_factory.mktemp("middle") / "data"
    write_dataset(root, *draw_synthetic(train_per_class=6, test_per_class=3), content="other")
    return root


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, middle_data: Path) -> Path:
    """runs/ with one finished run, `tiny`, with 100 validation rows."""
    folder = tmp_path_factory.mktemp("finished")
    validation: dict[str, Any] = {"data": {"val_size": 100}}
    train(quick_recipe(folder, "tiny", middle_data, **validation), cwd=folder)
    return folder / "runs"


@pytest.fixture
def run(tmp_path: Path, finished_runs: Path) -> Path:
    """A copy of the finished run in this test's folder, free to modify."""
    shutil.copytree(finished_runs, tmp_path / "runs")
    return tmp_path / "runs/tiny"


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> RecipeMaker:
    """Write a recipe into this test's folder."""
    return partial(write_recipe, tmp_path, data)


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherMaker:
    """Create a run folder with one checkpoint of a model initialized with `seed`."""

    def make(name: str, *, seed: int = 0, losses: Any = None, **model: Any) -> Path:
        config = ModelConfig(**{"backbone": "test_resnet"} | model)
        torch.manual_seed(seed)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = {"name": name, "model": json.loads(json.dumps(asdict(config)))}
        recipe |= {"losses": losses or {"cross_entropy": {}}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        save_checkpoint(
            folder / "checkpoints",
            step=1,
            tensors={"model": to_cpu(build_model(config, 100).state_dict())},
            optimizer={},
            progress={},
        )
        return folder

    return make
