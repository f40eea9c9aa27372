"""--force resumes a run with a changed recipe as far as its state fits, or leaves it unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from compare import lines
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step

from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.recipe.runs import load_model, load_run
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.run_folder.checkpoint import checkpoints, load_optimizer
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import sha256
from recipes import RecipeMaker

SHORT = {"epochs": 2}  # 12 steps


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run.epochs=1", "has completed 12 steps but this recipe has only 6"),
        ("optim.name=sgd", "SGD cannot continue from the state of AdamW"),
        ("model.freeze=[{pattern: 'backbone.conv1.*'}]", "the saved optimizer is another"),
    ],
)
def test_refused_force_leaves_the_run_unchanged(
    tmp_path: Path, recipe: RecipeMaker, change: str, words: str
) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    before = contents(tmp_path / "runs")
    output = train(path, change, "--force", cwd=tmp_path, expect=2)
    assert words in output
    assert "Traceback" not in output
    assert contents(tmp_path / "runs") == before
    assert "finished, top1" in train(path, cwd=tmp_path)


def test_forced_hyper_parameters_take_effect(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    new = ["optim.weight_decay=0.5", "optim.betas=[0.5, 0.6]", "optim.eps=0.1"]
    train(path, "run.epochs=3", *new, "--force", cwd=tmp_path)
    groups = load_optimizer(checkpoints(tmp_path / "runs/tiny/checkpoints")[0])["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.5, 0.6), 0.1)}


@pytest.mark.parametrize(
    "change",
    [
        "run.micro_batches=4",
        "losses={cross_entropy: {}, bce: {}}",
        "run.precision=fp16",
    ],
)
def test_forced_changes_resume(tmp_path: Path, recipe: RecipeMaker, change: str) -> None:
    """12 steps are two logs of 5 and an open window of 2; later logs are means."""
    path = recipe(run=SHORT, augment={"mixup": 0.0, "cutmix": 0.0})
    train(path, cwd=tmp_path)
    train(path, "run.epochs=3", change, "--force", cwd=tmp_path)
    losses = [line["loss"] for line in lines(tmp_path / "runs/tiny") if line["kind"] == "train"]
    assert max(losses) < 1.6 * min(losses) or "losses" in change
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 18


def test_unfreezing_after_a_finished_run(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(model={"freeze": [{"pattern": "backbone.conv1.*", "until_epoch": 1}]})
    train(path, "run.epochs=1", cwd=tmp_path)
    train(path, "run.epochs=2", "--force", cwd=tmp_path)
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 12


def test_forced_and_killed_run_is_not_finished(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    arguments = [path, "run.epochs=40", "run.eval_every_epochs=40"]
    saving = f"run.save_every_minutes={EVERY_STEP}"
    ranks = Launch("train", [*arguments, saving, "--force"], cwd=tmp_path)
    wait_for_step(ranks, tmp_path / "runs/tiny", 14)
    ranks.kill()
    assert not (tmp_path / "runs/tiny/summary.json").exists()
    assert "resuming from step" in train(*arguments, cwd=tmp_path)
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 240


def test_damaged_checkpoint_does_not_replace_a_valid_one(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 20, "eval_every_epochs": 20})
    arguments = [path, f"run.save_every_minutes={EVERY_STEP}"]
    ranks = Launch("train", arguments, cwd=tmp_path)
    folder = tmp_path / "runs/tiny/checkpoints"
    wait_for_step(ranks, tmp_path / "runs/tiny", 10)
    ranks.kill()
    newest = checkpoints(folder)[0]
    (newest / "model.safetensors").write_bytes(b"")
    newest.rename(folder / "step_00000200")  # what follows has lower numbers
    train(*arguments, "run.keep_checkpoints=1", cwd=tmp_path)
    assert {path.name for path in folder.iterdir()} == {"damaged_step_00000200", "step_00000120"}


def test_micro_batch_of_one_row_is_a_user_error(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(recipe(run=SHORT), "run.micro_batches=10", cwd=tmp_path, expect=2)
    assert "BatchNorm needs at least two rows" in output
    assert "Traceback" not in output


def test_window_of_other_micro_batches_or_terms_is_dropped() -> None:
    open_window = {
        "steps": 10,
        "seconds": 1.0,
        "skips": [0, 0, 10],
        "context": RankGroup(0, 1, None),
    }
    for names, sums in ((["loss"], [[450.0]]), (["other"], [[225.0], [225.0]])):
        window = MetricWindow(["loss"], micro_batches=2, device=torch.device("cpu"))
        window.restore(names=names, sums=sums, **open_window)  # type: ignore[arg-type]
        assert (window.steps, window.sums.sum().item()) == (0, 0.0)


def test_nonfinite_terms_survive_a_restart() -> None:
    ranks, device = RankGroup(0, 1, None), torch.device("cpu")
    before = MetricWindow(["loss", "cross_entropy"], micro_batches=2, device=device)
    before.nonfinite[1, 1] = 1
    kept = {"sums": before.read(), "nonfinite": before.read_nonfinite(), "skips": [1, 1, 0]}
    after = MetricWindow(["loss", "cross_entropy"], micro_batches=2, device=device)
    after.restore(names=after.names, steps=1, seconds=1.0, context=ranks, **kept)  # type: ignore[arg-type]
    assert after.nonfinite_terms(ranks) == "cross_entropy on rank 0"


def test_teacher_without_average_is_a_user_error(
    tmp_path: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(averaging=None), cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(content | {"averaging": {}}))  # as --force does
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no average"):
        find_teacher(TeacherConfig(run="runs/tiny"))
    with pytest.raises(UserError, match="has no average"):
        load_model(*load_run(run), 100)


def test_invalid_hyper_parameters_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"sgd does not accept these settings \(Nesterov"):
        build_optimizer(OptimConfig(name="sgd", momentum=0.0), torch.nn.Linear(1, 1))
