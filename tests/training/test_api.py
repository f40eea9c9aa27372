"""The Python API in scripts: one process, a launcher, and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compare import assert_same_bits
from launcher import free_port, train
from small_data import write_sized

from recipes import RecipeMaker

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from cifar_dist.api import UserError, evaluate, load_model, load_recipe, train
from cifar_dist.data.dataset import load_split

recipe = load_recipe(sys.argv[1], ["name=api"])
summary = train(recipe)
assert train(recipe) == summary  # finished: returned without training
report = evaluate(recipe.folder)
robust = evaluate(recipe.folder, corruptions="generated", ood=sys.argv[2])
assert 0 <= robust["corruptions"]["mean_corruption_error"] <= 100
assert 0 <= robust["ood"]["energy"]["auroc"] <= 100
model = load_model(str(recipe.folder))
images = load_split(Path(recipe.data.path), "test").images
logits = model.logits(images)
assert torch.equal(logits, load_file(recipe.folder / "predictions.safetensors")["logits"])
assert model.probabilities(logits).sum(1).allclose(torch.ones(len(images), dtype=torch.float64))
try:
    load_recipe(sys.argv[1], ["run.epoch=2"])
except UserError as error:
    assert "run.epochs" in str(error)
print("RESULT", json.dumps([summary["top1"], report["top1"], len(model.fine)]))
"""
DISTRIBUTED = """
import sys
from cifar_dist.api import load_recipe, train

if __name__ == "__main__":
    train(load_recipe(sys.argv[1], ["name=api_2p"]))
"""


def run(script: str, *arguments: str | Path, cwd: Path, launcher: tuple[str, ...] = ()) -> str:
    path = cwd / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, str(path), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_api_matches_the_command(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 2})
    train(path, "name=command", cwd=tmp_path)
    write_sized(tmp_path / "other", 48)
    output = run(SCRIPT, path, tmp_path / "other", cwd=tmp_path)
    top1, evaluated, classes = json.loads(output.partition("RESULT ")[2].splitlines()[0])
    assert top1 == evaluated
    assert classes == 100
    assert_same_bits(tmp_path / "runs/api", tmp_path / "runs/command")
    assert (tmp_path / "runs/api/evaluation/evaluation.json").exists()


def test_api_under_a_launcher(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 1})
    train(path, "name=command", cwd=tmp_path, world_size=2)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    run(DISTRIBUTED, path, cwd=tmp_path, launcher=launcher)
    assert_same_bits(tmp_path / "runs/api_2p", tmp_path / "runs/command")
