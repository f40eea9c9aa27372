"""Tests of `ensemble --soup`: mean of weights, BatchNorm statistics, greedy choice, and its folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launcher import train
from safetensors.torch import load_file
from small_data import quick_recipe
from stored_runs import replace_predictions
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment
from cifar_dist.data.dataset import load_split
from cifar_dist.data.training_rows import TrainingData, training_data
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.ensemble import main
from cifar_dist.evaluation.evaluator import EvalResult, update_bn
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.exporting.formats import export_soup
from cifar_dist.inference.soup import CONTEXT, Soup, average_models, greedy_soup, mean_state
from cifar_dist.inference.trained_model import TrainedModel, load_trained_model
from cifar_dist.models.classifier import build_model
from cifar_dist.models.freeze import FreezeConfig
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.run_folder.checkpoint import load_tensors
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker, with_teachers

RUNS = ["runs/swa", "runs/plain", "runs/other"]  # two forks of one run, and another seed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, middle_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("soup")
    sections: dict[str, Any] = {
        "run": {"epochs": 3, "batch_size": 50},
        "data": {"val_size": 100},
        "optim": {"name": "adamw", "lr": 0.01},
    }
    path = quick_recipe(folder, "start", middle_data, **sections)
    train(path, cwd=folder)
    fork = ["--fork", "runs/start", "run.epochs=2"]
    train(path, "name=plain", "optim.lr=0.002", *fork, cwd=folder)
    swa = ["averaging={kind: swa, start_epoch: 1}", "run.seed=1", "model.drop_rate=0.1"]
    train(path, "name=swa", "optim.lr=0.003", *swa, *fork, cwd=folder)
    train(path, "name=other", "run.seed=2", "run.epochs=1", cwd=folder)
    return folder


@pytest.fixture
def runs(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of runs/ that a test may modify, in the working directory."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def training_rows(member: TrainedModel) -> TrainingData:
    data = member.recipe.data
    return training_data(data, load_split(Path(data.path), "train"))


def report_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "ensemble.json").read_text())


def test_mean_of_known_tensors() -> None:
    one = {"weight": torch.tensor([1.0, 0.1]), "count": torch.tensor(3)}
    other = {"weight": torch.tensor([2.0, 0.3]), "count": torch.tensor(8)}
    mean = mean_state([one, other])
    torch.testing.assert_close(mean["weight"], torch.tensor([1.5, 0.2]))
    assert mean["count"].item() == 3
    assert mean["count"].dtype == torch.int64
    assert torch.equal(mean_state([one] * 3)["weight"], one["weight"])


def test_greedy_soup_tries_the_best_first_and_leaves_out_what_lowers_top1() -> None:
    def soup(*members: int, top1: float) -> Soup:
        result = EvalResult(metrics={"top1": top1}, logits=Tensor(), labels=Tensor())
        unused: Any = None
        return Soup(members=members, trained=unused, bn_rows=0, val=result)

    accuracy = {(1, 3): 69.0, (1, 0): 70.0, (1, 0, 2): 71.0, (1, 0, 2, 4): 70.9}
    tried = []

    def average(members: tuple[int, ...]) -> Soup:
        tried.append(members)
        return soup(*members, top1=accuracy[members])

    singles = [soup(index, top1=top1) for index, top1 in enumerate([60, 70, 50, 65, 40])]
    result = greedy_soup([Path("runs") for _ in singles], singles, average)
    assert tried == list(accuracy)
    assert result.members == (1, 0, 2)
    assert result.val_top1 == 71


def test_statistics_are_those_of_the_averaged_model(runs: Path) -> None:
    members = [load_trained_model(runs / name) for name in ("plain", "other")]
    before = [copy.deepcopy(member.model.state_dict()) for member in members]
    train = training_rows(members[0])
    soup, rows = average_models(members, train)
    assert rows == 500
    recipe = members[0].recipe
    mean = {name: sum(state[name] for state in before) / 2 for name in before[0]}
    expected = build_model(recipe.model, 100, mean).eval()
    update_bn(
        expected,
        Augment(recipe.augment, train.split),
        train.split,
        train.rows,
        seed=recipe.run.seed,
        epoch=1,
        precision="fp32",
        context=CONTEXT,
    )
    actual = soup.model.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in soup.model.modules())
    for member, state in zip(members, before, strict=True):
        assert all(
            torch.equal(value, state[name]) for name, value in member.model.state_dict().items()
        )


def test_frozen_layers_keep_their_statistics(runs: Path) -> None:
    member = load_trained_model(runs / "plain")
    config = replace(member.recipe.model, freeze=(FreezeConfig(pattern="backbone.bn1.*"),))
    member = replace(member, recipe=replace(member.recipe, model=config))
    soup, _ = average_models([member, member], training_rows(member))
    before = member.model.state_dict()
    same = {
        name.removesuffix(".running_mean")
        for name, value in soup.model.state_dict().items()
        if name.endswith("running_mean") and torch.equal(value, before[name])
    }
    assert same == {"backbone.bn1"}


def test_soup_of_one_run_is_the_run(runs: Path) -> None:
    """SWA has recomputed the statistics on the same images. The averaged weights are used."""
    member = load_trained_model(runs / "swa")
    soup, _ = average_models([member, member], training_rows(member))
    saved = load_tensors(member.checkpoint, "average")
    for name, value in soup.model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, saved[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, saved[name]), name
    images = training_rows(member).split.images[:100]
    torch.testing.assert_close(soup.logits(images), member.logits(images), rtol=1e-3, atol=1e-3)


def test_greedy_soup_leaves_out_another_seed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUNS, "--soup"]) == 0
    report = report_of("ensemble")
    output = capsys.readouterr().out
    assert re.search(r"with runs/other \(.*, left out", output)
    assert report["members"][2]["weight"] == 0
    assert report["weights_chosen_on"] == "100 validation rows"
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in RUNS]
    val_top1 = [summary["val_top1"] for summary in summaries]
    assert [member["val_top1"] for member in report["members"]] == pytest.approx(val_top1)
    assert report["ensemble"]["val_top1"] >= max(val_top1)


def test_folder_is_a_teacher_and_initial_weights(
    runs: Path, recipe: RecipeMaker, middle_data: Path
) -> None:
    assert main([*RUNS[:2], "--soup", "--uniform", "--output", "soup"]) == 0
    report = report_of("soup")
    assert report["batchnorm_rows"] == 500
    predictions = load_file("soup/predictions.safetensors")
    metrics = classification_metrics(predictions["logits"], predictions["labels"])
    assert report["ensemble"]["top1"] == metrics["top1"]
    teacher = find_teacher(TeacherConfig(run="soup"))
    model = build_model(teacher.model, 100, load_file(teacher.weights)).eval()
    with torch.no_grad():
        logits = model(load_split(middle_data, "test").images).logits
    torch.testing.assert_close(logits, predictions["logits"], rtol=1e-4, atol=1e-4)
    card = Path("soup/README.md").read_text()
    assert "the mean of the weights of `runs/swa`, `runs/plain`. " in card
    assert f"| top-1, % of the test split | {metrics['top1']:.4g} |" in card

    sections = with_teachers() | {"teacher": {"run": "soup"}}
    mixing = {"mixup": 0, "cutmix": 0}
    student = recipe("student", **sections, run={"epochs": 1}, augment=mixing)
    assert "teacher soup: test_resnet" in train(student, cwd=runs.parent)
    start = {
        "weights": "soup/model.safetensors",
        "mean": [0.5071, 0.4865, 0.4409],
        "std": [0.2673, 0.2564, 0.2762],
    }
    train(recipe("finetuned", run={"epochs": 1}, model=start), cwd=runs.parent)


def test_test_split_does_not_affect_the_choice(runs: Path) -> None:
    assert main([*RUNS, "--soup"]) == 0
    stored = load_file("runs/other/predictions.safetensors")
    stored["logits"] = torch.nn.functional.one_hot(stored["labels"], 100).float()  # all correct
    replace_predictions(Path("runs/other"), stored)
    assert main([*RUNS, "--soup", "--output", "again"]) == 0
    weights = [
        [member["weight"] for member in report_of(f)["members"]] for f in ("ensemble", "again")
    ]
    assert weights[0] == weights[1]


def test_uniform_soup_has_all_runs(runs: Path) -> None:
    assert main([*RUNS, "--soup", "--uniform"]) == 0
    report = report_of("ensemble")
    assert [member["weight"] for member in report["members"]] == [1 / 3] * 3
    assert report["weights_chosen_on"] == "nothing: uniform"
    soup = load_file("ensemble/model.safetensors")
    states = [load_trained_model(Path(run)).model.state_dict() for run in RUNS]
    for name, value in mean_state(states).items():
        assert torch.equal(soup[name], value) or "running" in name or "num_batches" in name, name


def set_recipe(run: Path, section: str, **keys: Any) -> None:
    path = run / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe[section] = recipe[section] | keys
    path.write_text(yaml.safe_dump(recipe))


def test_without_validation_rows_the_soup_is_uniform(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "other"):
        set_recipe(runs / name, "data", val_size=0)
    assert main(["runs/plain", "runs/other", "--soup"]) == 0
    assert "weights chosen on nothing: uniform" in capsys.readouterr().out
    report = report_of("ensemble")
    assert [member["weight"] for member in report["members"]] == [0.5, 0.5]
    assert "val_top1" not in report["ensemble"]


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("model", {"image_size": 64}, "model.image_size is 64, not 32"),
        ("data", {"val_size": 0}, "data.val_size is 0, not 100"),
        ("data", {"label_noise": {"kind": "symmetric", "rate": 0.2}}, "data.label_noise"),
        ("data", {"labels": "coarse"}, "data.labels is coarse, not fine"),
        ("losses", {"l_softmax": {"weight": 0}}, None),
        ("optim", {"lr": 1.0}, None),
        ("augment", {"cutout": 8}, None),
        ("data", {"shuffle": False}, None),
    ],
)
def test_runs_that_differ_are_refused_if_it_matters(
    runs: Path, section: str, keys: dict[str, Any], words: str | None
) -> None:
    set_recipe(runs / "plain", section, **keys)
    arguments = ["runs/swa", "runs/plain", "--soup"]
    if words is None:
        assert main(arguments) == 0
        return
    with pytest.raises(UserError, match=f"^runs/plain cannot be averaged with runs/swa: {words}"):
        main(arguments)
    assert not Path("ensemble").exists()


def test_other_data_and_lost_weights_are_refused(runs: Path) -> None:
    arguments = ["runs/swa", "runs/plain", "--soup"]
    with pytest.raises(UserError, match="--data is for --soup"):
        main([*arguments[:2], "--data", "data"])
    path = runs / "plain/environment.json"
    environment = path.read_text()
    path.write_text(json.dumps(json.loads(environment) | {"data": "0123"}))
    with pytest.raises(UserError, match="has other data than"):
        main(arguments)
    path.write_text(environment)
    summary = json.loads((runs / "plain/summary.json").read_text())
    (runs / "plain/summary.json").write_text(json.dumps(summary | {"steps": 7}))
    with pytest.raises(UserError, match=r"its results \(step_00000007\) are damaged or missing"):
        main(arguments)


def test_folder_is_complete_or_absent(runs: Path, tmp_path: Path) -> None:
    trained = load_trained_model(runs / "plain")
    test = EvalResult(metrics={}, logits=torch.zeros(1, 100), labels=torch.zeros(1).long())
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_soup(trained, test, {"loss": float("nan")}, tmp_path / "soups/one")
    assert list((tmp_path / "soups").iterdir()) == []
