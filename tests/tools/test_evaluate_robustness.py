"""Tests of `evaluate --corruptions` and `--ood` with real runs, and of their part of the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import Launch, train
from small_data import first_rows, with_classes

from cifar_dist import report
from cifar_dist.api import load_model
from cifar_dist.data.corruptions import PUBLISHED_KINDS, SEVERITIES, corrupt
from cifar_dist.data.dataset import data_digest, load_split, write_dataset
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.evaluation.robustness import ood_scores
from recipes import RecipeMaker


def evaluate(*arguments: object, cwd: Path, world_size: int = 1, expect: int = 0) -> str:
    launch = Launch("evaluate", ("runs/tiny", *arguments), cwd=cwd, world_size=world_size)
    assert launch.wait() == [expect] * world_size, launch.output
    return launch.output


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_corruptions_and_ood_are_evaluated_stored_and_reported(
    recipe: RecipeMaker, tmp_path: Path, middle_data: Path
) -> None:
    """The test images are training images, so that the network is right about some of them.

    The other data set has more classes.
    """
    rows, _, meta = with_classes(10)
    data = tmp_path / "data"
    write_dataset(data, rows, first_rows(rows, 23), meta, content="other")
    keys = {"data": {"path": str(data)}, "augment": {"mixup": 0.0, "cutmix": 0.0, "cutout": 0}}
    train(recipe(run={"epochs": 15}, averaging={}, **keys), cwd=tmp_path)
    folder = tmp_path / "runs/tiny/evaluation"
    output = evaluate("--corruptions", "--ood", middle_data, cwd=tmp_path, world_size=2)
    first = read_report(folder)
    corruptions = first["corruptions"]
    assert f"mean corruption error {corruptions['mean_corruption_error']:.2f} %" in output
    assert corruptions["source"] == "generated, without frost"
    assert set(corruptions["top1"]) == set(PUBLISHED_KINDS) - {"frost"}
    model, test = load_model(tmp_path / "runs/tiny"), load_split(data, "test")
    fog = corrupt(test.images, range(23), "fog", 2)
    snow = corrupt(test.images, range(23), "snow", 2)
    for kind, images in {"fog": fog, "snow": snow}.items():
        expected_top1 = top1(model.logits(images), test.labels)
        assert corruptions["top1"][kind][1] == pytest.approx(expected_top1)
    other = model.logits(load_split(middle_data, "test").images)
    expected = ood_scores(model.logits(test.images), other)
    assert first["ood"]["digest"] == data_digest(middle_data)
    for score, values in expected.items():
        assert first["ood"][score] == pytest.approx(values)
    lines = (folder / "corruptions.csv").read_text().splitlines()
    assert len(lines) == 1 + 14 + 1
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "runs/tiny"), "--output", str(page)]) == 0
    text = page.read_text()
    assert "Corrupted test images" in text
    assert text.count('<th scope="row">glass blur</th>') == 1
    assert "AUROC against data (energy score)" in text

    # Published files, with test-time augmentation: the second severity of all kinds is that of fog.
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c/labels.npy", np.tile(test.labels.numpy(), 5))
    files = torch.stack([fog if severity == 2 else 0 * fog for severity in SEVERITIES])
    for kind in PUBLISHED_KINDS:
        np.save(tmp_path / f"c/{kind}.npy", files.flatten(0, 1).permute(0, 2, 3, 1).numpy())
    evaluate("--corruptions", "c", "--tta-flip", "--output", "flipped", cwd=tmp_path)
    corruptions = read_report(tmp_path / "flipped")["corruptions"]
    assert tuple(corruptions["top1"]) == PUBLISHED_KINDS
    expected_top1 = top1(model.logits(fog) + model.logits(fog.flip(3)), test.labels)
    assert corruptions["top1"]["frost"][1] == pytest.approx(expected_top1)

    evaluate(cwd=tmp_path)
    assert read_report(folder)["corruptions"] is None
    assert not (folder / "corruptions.csv").exists()


def test_invalid_options_are_refused(run: Path, tmp_path: Path, middle_data: Path) -> None:
    (tmp_path / "empty").mkdir()
    # The same test split, other training rows.
    draw = draw_synthetic(train_per_class=1, test_per_class=3)
    write_dataset(tmp_path / "twin", *draw, content="other")
    for arguments, message in {
        ("--ood", middle_data): f"--ood {middle_data}: is the data of the run",
        ("--ood", "twin"): "--ood twin: is the data of the run",
        ("--ood", "empty"): "--ood empty: has no data; give a folder written by",
        ("--corruptions", "empty"): "empty/labels.npy: cannot be read (No such file",
    }.items():
        output = evaluate(*arguments, cwd=tmp_path, expect=2)
        assert message in output
        assert not (run / "evaluation").exists()


def test_options_are_checked_before_slow_imports(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from cifar_dist.evaluate import main\n"
        "from cifar_dist.utils.errors import UserError\n"
        "for arguments in (['--ood', 'x'], ['--corruptions', 'x'],\n"
        "                  ['--corruptions', '--split', 'val']):\n"
        "    try:\n"
        "        main(['runs/x', *arguments])\n"
        "    except UserError as error:\n"
        "        print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "--ood x: is not a folder; give an existing one",
        "--corruptions x: is not a folder; give an existing one",
        "--corruptions needs the test split; remove it, or --split val",
        "False",
    ]
