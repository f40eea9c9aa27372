"""--fork starts a new run from the newest checkpoint of another one, or changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compare import assert_same_bits, largest_difference, lines
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step

from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.distributed.context import DistContext as RankGroup
from cifar_dist.inference.ensembling import combine
from cifar_dist.inference.stored_run import read_run
from cifar_dist.optim.optimizer import OptimConfig, build_optimizer
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.runs import load_model, load_run
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.reporting.comparison import group_runs, latex_table
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    load_optimizer,
    load_progress,
    load_tensors,
)
from cifar_dist.training.fork import Fork, plan_fork
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import sha256
from recipes import RecipeMaker

SHORT = {"epochs": 2}  # 12 steps
FORK = ("name=new", "--fork", "runs/tiny")


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in folder.rglob("*") if path.is_file()}


def stopped(path: Path, cwd: Path, step: int, **launch: Any) -> int:
    """Train and stop with SIGUSR1 after `step` updates or later; return the step."""
    ranks = Launch("train", [path, f"run.save_every_minutes={EVERY_STEP}"], cwd=cwd, **launch)
    wait_for_step(ranks, cwd / "runs/tiny", step)
    os.kill(ranks.processes[0].pid or 0, signal.SIGUSR1)
    assert set(ranks.wait()) == {75}, ranks.output
    return int(checkpoints(cwd / "runs/tiny/checkpoints")[0].name.removeprefix("step_"))


def origin(cwd: Path, name: str = "new") -> dict[str, Any]:
    return json.loads((cwd / "runs" / name / "environment.json").read_text())["origin"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["--fork", "runs/tiny", "run.epochs=3"],
            "another recipe (run.epochs: 1 -> 3); choose another",
        ),
        ([*FORK], "has finished all its 1 epochs, and a fork with the same run.epochs"),
        (
            [*FORK, "optim.lr=0.1"],
            "so nothing would be trained; another run.epochs starts a new schedule",
        ),
        (
            [*FORK, "data.val_size=100", "run.epochs=3"],
            "was trained on rows that data.val_size=100 uses for validation",
        ),
        (["name=new", "--fork", "runs/absent"], "runs/absent is not a run folder"),
        ([*FORK, "run.epochs=3", "model.backbone=test_vit"], "check model.backbone"),
        (["--fork", "runs/absent"], "runs/tiny was not forked from runs/absent"),
    ],
)
def test_senseless_fork_is_one_sentence_and_changes_nothing(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, changes: list[str], words: str
) -> None:
    path = recipe(run={"epochs": 1, "batch_size": 200}, data={"path": str(middle_data)})
    train(path, cwd=tmp_path)
    before = contents(tmp_path / "runs")
    output = train(path, *changes, cwd=tmp_path, expect=2)
    assert words in output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    assert contents(tmp_path / "runs") == before


def test_fork_on_other_data_is_refused(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    other = [f"data.path={middle_data}", "run.epochs=3"]
    assert "was trained on other data" in train(path, *FORK, *other, cwd=tmp_path, expect=2)


def test_fork_with_the_same_steps_continues_at_the_origins_step(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """More micro-batches, as after an out-of-memory error, with another learning rate."""
    path = recipe(run={"epochs": 20})
    step = stopped(path, tmp_path, 8)
    before = contents(tmp_path / "runs/tiny")
    changes = ["run.micro_batches=5", "optim.lr=0.001", "optim.weight_decay=0.5"]
    output = train(path, *FORK, *changes, cwd=tmp_path)
    assert f"forked from runs/tiny at step {step}, starting at step {step}; " in output
    assert "optim.lr: 0.003 -> 0.001" in output
    assert contents(tmp_path / "runs/tiny") == before
    assert lines(tmp_path / "runs/new")[0]["step"] > step
    (saved, *_) = checkpoints(tmp_path / "runs/new/checkpoints")
    stored = load_progress(saved)
    assert (stored["step"], stored["micro_batches"]) == (120, 5)
    assert stored["origin"] == origin(tmp_path)
    assert stored["origin"]["start_step"] == step
    optimizer = load_optimizer(saved)
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.5}
    assert optimizer["state"][0]["step"] == 120, "the optimizer's state continues"
    assert "finished, top1" in train(path, *FORK, *changes, cwd=tmp_path)  # again


def test_fork_of_an_unchanged_recipe_has_the_bits_of_the_uninterrupted_run(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 20})
    stopped(path, tmp_path, 8)
    train(path, *FORK, cwd=tmp_path)
    train(path, cwd=tmp_path)
    assert largest_difference(tmp_path / "runs/tiny", tmp_path / "runs/new") == 0


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ("run.epochs=3", 18),
        ("run.batch_size=20", 6),
        ("losses={cross_entropy: {}, bce: {}}", None),
    ],
)
def test_fork_with_other_steps_has_its_own_schedule(
    tmp_path: Path, recipe: RecipeMaker, change: str, steps: int | None
) -> None:
    path = recipe(run=SHORT, augment={"mixup": 0.0, "cutmix": 0.0})
    train(path, cwd=tmp_path)
    extra = [] if steps else ["run.epochs=1"]
    output = train(path, *FORK, change, *extra, "run.log_every_steps=1", cwd=tmp_path)
    assert "forked from runs/tiny at step 12, starting at step 0; " in output
    records = [line for line in lines(tmp_path / "runs/new") if line["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, (steps or 6) + 1))
    first = next(line for line in lines(tmp_path / "runs/tiny") if line["kind"] == "train")
    assert records[0]["cross_entropy"] < first["cross_entropy"], "the weights are trained"


@pytest.mark.parametrize(
    "change", ["optim.name=sgd", "model.freeze=[{pattern: 'backbone.conv1.*'}]"]
)
def test_optimizer_state_that_does_not_fit_starts_anew(
    tmp_path: Path, recipe: RecipeMaker, change: str
) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    output = train(path, *FORK, change, "run.epochs=1", "optim.lr=0.001", cwd=tmp_path)
    assert "with a new optimizer state" in output


def test_swa_of_a_fork_averages_only_its_own_epochs(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Its start lies before the fork; 6 steps per epoch."""
    path = recipe(run={"epochs": 20, "keep_checkpoints": 100}, averaging=None)
    step = stopped(path, tmp_path, 13)
    swa = ["averaging={kind: swa, start_epoch: 1}", f"run.save_every_minutes={EVERY_STEP}"]
    ranks = Launch("train", [path, *FORK, *swa, "run.keep_checkpoints=200"], cwd=tmp_path)
    assert ranks.wait() == [0], ranks.output
    folder, first = tmp_path / "runs/new/checkpoints", -(-step // 6) * 6
    if step % 6 == 0:
        first += 6  # the end of an epoch that the origin finished
    ends = range(first, 121, 6)
    models = [load_tensors(folder / f"step_{end:08d}", "model") for end in ends]
    average = load_tensors(folder / "step_00000120", "average")
    for name, value in average.items():
        if "running" not in name and value.is_floating_point():
            mean = sum(model[name].double() for model in models) / len(models)
            torch.testing.assert_close(value.double(), mean, rtol=1e-4, atol=1e-6)


def test_killed_fork_resumes_with_the_same_bits(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    words = [path, "--fork", "runs/tiny", "run.epochs=30", "averaging={decay: 0.5}"]
    train(*words, "name=straight", cwd=tmp_path)
    saving = f"run.save_every_minutes={EVERY_STEP}"
    ranks = Launch("train", [*words, "name=killed", saving], cwd=tmp_path)
    wait_for_step(ranks, tmp_path / "runs/killed", 14)
    ranks.kill()
    output = train(*words[:1], *words[3:], "name=killed", cwd=tmp_path)  # also without --fork
    assert "resuming from step" in output
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def test_fork_killed_before_its_first_checkpoint_is_still_a_fork(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run=SHORT)
    train(path, cwd=tmp_path)
    train(path, *FORK, "run.epochs=1", cwd=tmp_path)
    shutil.rmtree(tmp_path / "runs/new/checkpoints")
    (tmp_path / "runs/new/summary.json").unlink()
    assert "forked from runs/tiny" in train(path, "name=new", "run.epochs=1", cwd=tmp_path)


def test_run_is_not_taken_for_a_fork_of_another_one(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run=SHORT)
    for name in ("a", "b", "tiny"):
        train(path, f"name={name}", "run.epochs=1", cwd=tmp_path)
    (tmp_path / "runs/b/summary.json").unlink()
    words = [path, "name=b", "run.epochs=1", "--fork", "runs/a"]
    assert "runs/b was not forked from runs/a" in train(*words, cwd=tmp_path, expect=2)


def test_fork_is_shown_and_never_pooled_with_runs_from_scratch(
    tmp_path: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(run={"epochs": 1})
    for seed in (0, 1):
        train(path, f"name=tiny_s{seed}", f"run.seed={seed}", cwd=tmp_path)
        words = [f"name=fork_s{seed}", f"run.seed={seed}", "--fork", f"runs/tiny_s{seed}"]
        train(path, *words, "run.epochs=2", cwd=tmp_path)
    train(path, "name=scratch", "run.epochs=2", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ("tiny_s0", "tiny_s1", "scratch", "fork_s0", "fork_s1")
    groups = group_runs([read_run(Path("runs", name)) for name in names])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("tiny", 2),
        ("scratch", 1),
        ("fork (fork of runs/tiny_s0 at step 6)", 2),
    ]
    assert "start: from scratch → fork of runs/tiny_s0 at step 6" in groups[2].config_diff
    assert "fork of runs/tiny" in latex_table(groups).replace("\\_", "_")
    result, _, _ = combine([read_run(Path("runs", name)) for name in names[2:]], uniform=True)
    assert result["members"][1]["origin"] == "fork of runs/tiny_s0 at step 6"


def test_fork_of_a_fork_keeps_the_rows_that_its_origins_trained_on(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    path = recipe(run={"epochs": 1, "batch_size": 100}, data={"path": str(middle_data)})
    train(path, "data.val_size=0", cwd=tmp_path)
    train(path, *FORK, "run.epochs=2", cwd=tmp_path)
    words = ["name=third", "--fork", "runs/new", "data.val_size=100"]
    assert "for validation" in train(path, *words, cwd=tmp_path, expect=2)
    train(path, "name=val", "data.val_size=200", cwd=tmp_path)
    train(path, "name=fewer", "--fork", "runs/val", "data.val_size=100", cwd=tmp_path)
    words = ["name=more", "--fork", "runs/fewer", "data.val_size=200"]
    assert "set data.val_size=100" in train(path, *words, cwd=tmp_path, expect=2)


def test_fork_with_another_subset_has_no_validation_rows(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation rows of one subset are training rows of another; noise changes no rows."""
    monkeypatch.chdir(tmp_path)
    data = {"path": str(middle_data), "val_size": 100, "fraction": 0.5}
    path = recipe(run={"epochs": 1, "batch_size": 50}, data=data)
    train(path, cwd=tmp_path)

    def planned(folder: str, *changes: str) -> Fork:
        changed = load_recipe(path, ["run.epochs=2", *changes])
        saved = load_progress(checkpoints(Path(folder, "checkpoints"))[0])
        return plan_fork(changed, Path(folder), data=saved["data"])

    for change in ("data.fraction=1.0", "data.long_tail.imbalance=2"):
        with pytest.raises(UserError, match=r"set data\.val_size=0, or data\.fraction and data\."):
            planned("runs/tiny", change)
        assert planned("runs/tiny", change, "data.val_size=0").val_size == 0
    noise = "data.label_noise={kind: symmetric, rate: 0.4}"
    noisy = planned("runs/tiny", noise)
    assert noisy.val_size == 100
    assert "data.label_noise.rate: None -> 0.4" in noisy.differences
    whole = ["name=whole", "data.fraction=1.0", "data.val_size=0"]
    train(path, *whole, "--fork", "runs/tiny", cwd=tmp_path)
    with pytest.raises(UserError, match=r"set data\.val_size=0$"):
        planned("runs/whole")
    with pytest.raises(UserError, match=r"set data\.val_size=0$"):
        planned("runs/whole", "data.fraction=1.0")
    assert planned("runs/whole", "data.val_size=0").start_step == 0


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
    (run / "recipe.yaml").write_text(yaml.safe_dump(content | {"averaging": {}}))  # by hand
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no average"):
        find_teacher(TeacherConfig(run="runs/tiny"))
    with pytest.raises(UserError, match="has no average"):
        load_model(*load_run(run), 100)


def test_invalid_hyper_parameters_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"sgd does not accept these settings \(Nesterov"):
        build_optimizer(OptimConfig(name="sgd", momentum=0.0), torch.nn.Linear(1, 1))
