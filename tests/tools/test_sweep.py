"""Tests of the `sweep` command: definitions, trials that survive kills, pruning, the best recipe."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from compare import assert_same_bits
from launcher import train
from optuna.trial import TrialState
from small_data import quick_recipe

from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.sweep import load_sweep
from cifar_dist.sweep import main
from cifar_dist.tuning.results import format_table, ranking, write_best
from cifar_dist.tuning.study import SweepFolder, ask, open_sweep, values_of
from cifar_dist.tuning.worker import claim_trial, last_error, try_lock
from cifar_dist.utils.errors import UserError

GRID = {"optim.lr": {"choices": [0.01, 0.1]}}


@pytest.fixture
def sweep_file(tmp_path: Path, middle_data: Path) -> Any:
    """Return a function that writes a sweep over a small recipe of 500 rows, without a pruner."""
    sections: dict[str, Any] = {
        "run": {"epochs": 4, "batch_size": 50, "micro_batches": 2, "log_every_steps": 5},
        "optim": {"name": "sgd", "lr": 0.1},
        "tracking": {"mode": "off"},
    }
    recipe = quick_recipe(tmp_path, "small", middle_data, **sections)

    def write(name: str = "lr", **changes: Any) -> Path:
        content: dict[str, Any] = {
            "recipe": str(recipe),
            "set": {"data.val_size": 100},
            "search": GRID,
            "sampler": {"name": "grid"},
        }
        path = tmp_path / f"{name}.yaml"
        merged = {key: value for key, value in (content | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(merged))
        return path

    return write


def start_worker(file: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cifar_dist.sweep", str(file), *options]
    return subprocess.Popen(
        command, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(worker: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = worker.communicate(timeout=600)
    assert worker.returncode == code, output
    return output


def write_records(run: SweepFolder, number: int, values: Sequence[float]) -> None:
    """Write the evaluations of a trial, one per epoch."""
    folder = run.trial_folder(number)
    folder.mkdir(exist_ok=True)
    records = [
        {"kind": "eval", "step": epoch, "epoch": float(epoch), "val_top1": value, "top1": 0.0}
        for epoch, value in enumerate(values, 1)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)


# ----------------------------------------------------------------------------- definitions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sarch": {}}, "sarch: unknown key; did you mean search?"),
        ({"search": {}}, "search is empty"),
        ({"search": {"optim.lr": {"low": 1, "high": 1}}}, "the range is empty"),
        ({"search": {"optim.lr": {"low": 0, "high": 1, "log": True}}}, "log needs low above 0"),
        ({"search": {"optim.lr": {"low": 0.1}}}, "give either choices, or low and high"),
        ({"search": {"optim.lr": {"choices": []}}}, "choices need at least one value"),
        ({"search": {"optim.lr": {"lo": 1}}}, "search.optim.lr"),
        (
            {"search": {"optim.weigth_decay": {"choices": [1]}}},
            "optim.weigth_decay: unknown key; did you mean optim.weight_decay",
        ),
        ({"search": {"optim.lr": {"choices": [0.1, -1.0]}}}, "with optim.lr=-1.0: .*greater than"),
        ({"search": {"data.val_size": {"choices": [1]}}}, "search cannot contain data.val_size"),
        (
            {"search": {"data.label_noise.rate": {"choices": [0.1]}}},
            "search cannot contain data.label_noise.rate",
        ),
        ({"metric": "top1"}, "metric must be one of val_top1.*overestimate"),
        ({"set": {}}, "needs validation rows: add `set: {data.val_size: 5000}`"),
        ({"sampler": {"name": "random"}}, "trials is missing"),
        (
            {"search": {"optim.lr": {"low": 0.1, "high": 1.0}}},
            "sampler grid needs choices for each key",
        ),
        ({"pruner": {"reduction_factor": 1}}, "reduction_factor must be at least 2"),
        ({"recipe": "recipes/r18_23.yaml"}, "r18_23.yaml: no such recipe; did you mean"),
    ],
)
def test_wrong_definitions_are_refused(
    sweep_file: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(sweep_file(**changes))


def test_shipped_sweeps_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        sweep, recipe = load_sweep(file)
        assert recipe.data.val_size
        assert sweep.num_trials > 1


def test_changed_definition_is_refused_except_for_more_trials(sweep_file: Any) -> None:
    random_search = {"sampler": {"name": "random"}, "trials": 2}
    file = sweep_file(**random_search)
    open_sweep(file)
    assert open_sweep(sweep_file(**random_search | {"trials": 3})).sweep.num_trials == 3
    other = {"search": {"optim.lr": {"choices": [0.02, 0.1]}}}
    message = (
        r"search\.optim\.lr\.choices: \[0\.01, 0\.1\] -> \[0\.02, 0\.1\].*give .*lr\.yaml another"
    )
    with pytest.raises(UserError, match=message):
        open_sweep(sweep_file(**random_search, **other))
    recipe = file.parent / "small.yaml"
    recipe.write_text(recipe.read_text().replace("batch_size: 50", "batch_size: 25"))
    with pytest.raises(UserError, match=r"recipe\.run\.batch_size: 50 -> 25"):
        open_sweep(sweep_file(**random_search))


# ----------------------------------------------------------------------------- trials


SPACE = {
    "optim.lr": {"low": 0.001, "high": 1.0, "log": True},
    "augment.cutout": {"low": 0, "high": 16},
    "optim.weight_decay": {"choices": [0.0001, 0.001]},
}


def test_values_of_random_search_depend_on_the_trial_number_alone(sweep_file: Any) -> None:
    random_search = {"search": SPACE, "sampler": {"name": "random"}, "trials": 8}
    first, second = (open_sweep(sweep_file(name, **random_search)) for name in ("a", "b"))
    for run in (first, first, first, second, first):  # `second` is asked between the others
        ask(run)
    second = open_sweep(sweep_file("b", **random_search))  # as by another worker
    while ask(second):
        pass
    assert len(second.trials) == 8
    values = [values_of(trial) for trial in second.trials]
    assert [values_of(trial) for trial in first.trials] == values[:4]
    assert [trial.params for trial in first.trials] == values[:4]
    assert len({value["optim.lr"] for value in values}) == 8
    assert all(0.001 <= value["optim.lr"] <= 1 for value in values)
    assert {type(value["augment.cutout"]) for value in values} == {int}


def test_tpe_prefers_values_with_good_results(sweep_file: Any) -> None:
    search = {"optim.lr": {"low": 0.0001, "high": 1.0, "log": True}}
    run = open_sweep(sweep_file(search=search, sampler={"name": "tpe"}, trials=40))
    while (trial := ask(run)) is not None:
        lr = values_of(run.trials[trial.number])["optim.lr"]
        run.study.tell(trial.number, -abs(lr - 0.3))
    late = [values_of(trial)["optim.lr"] for trial in run.trials[25:]]
    assert sum(0.1 < lr < 1 for lr in late) > len(late) / 2  # a quarter of the range


def test_a_trial_is_trained_by_one_worker_and_an_interrupted_one_comes_first(
    sweep_file: Any,
) -> None:
    file = sweep_file()
    first, second = open_sweep(file), open_sweep(file)
    with claim_trial(first) as one:
        assert one is not None
        with claim_trial(second) as other:
            assert other is not None
            assert (one.number, other.number) == (0, 1)
            with claim_trial(open_sweep(file)) as third:
                assert third is None
    with claim_trial(second) as resumed:
        assert resumed is not None
        assert resumed.number == 0
    with ExitStack() as stack:
        assert try_lock(first, 0, stack)
        assert not try_lock(second, 0, stack)
        with claim_trial(second) as resumed:
            assert resumed is not None
            assert resumed.number == 1


def test_torn_line_of_the_journal_is_removed(sweep_file: Any) -> None:
    file = sweep_file()
    run = open_sweep(file)
    ask(run)
    journal = run.path / "journal.log"
    before = journal.read_bytes()
    journal.write_bytes(before + b'{"op_code":5,"worker_id":"x')  # killed inside a write
    run = open_sweep(file)
    ask(run)
    assert journal.read_bytes().startswith(before)
    assert len(open_sweep(file).trials) == 2
    for line in journal.read_bytes().splitlines():
        json.loads(line)


# ----------------------------------------------------------------------------- results


def test_ranking_table_and_best_recipe(sweep_file: Any) -> None:
    search = {"optim.lr": {"choices": [0.01, 0.1, 0.2, 0.3]}}
    run = open_sweep(sweep_file(search=search))
    results: list[list[float]] = [[10, 20, 30, 40], [10, 20, 60, 41.5], [50, 60], []]
    for number, values in enumerate(results):
        trial = ask(run)
        assert trial is not None
        write_records(run, number, values)
    names = [result.name for _, result in ranking(run)]
    assert names == ["trial_0001", "trial_0000", "trial_0002"]
    header, best, _, pruned = format_table(run).splitlines()
    assert header.split() == ["trial", "state", "epoch", "val_top1", "optim.lr"]
    assert best.split() == ["trial_0001", "running", "4/4", "41.5", "0.1"]
    assert pruned.split()[2:] == ["2/4", "60", "0.2"]
    path = write_best(run)
    assert path is not None
    recipe = load_recipe(path)
    assert (recipe.optim.lr, recipe.data.val_size, recipe.name) == (0.1, 0, "lr_best")
    assert "val_top1 41.5 at epoch 4 of 4" in path.read_text()


def test_loss_is_minimized(sweep_file: Any) -> None:
    run = open_sweep(sweep_file(metric="val_loss"))
    assert run.study.direction == optuna.study.StudyDirection.MINIMIZE
    for number, loss in enumerate((2.0, 1.0)):
        ask(run)
        write_records(run, number, [0.0] * 4)
        path = run.trial_folder(number) / "metrics.jsonl"
        path.write_text(path.read_text().replace('"val_top1": 0.0', f'"val_loss": {loss}'))
    assert [result.name for _, result in ranking(run)] == ["trial_0001", "trial_0000"]


def test_error_in_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("epoch 1\nerror: the loss is not finite\nlast line\n")
    assert last_error(log) == f"the loss is not finite (see {log})"


# ----------------------------------------------------------------------------- workers


def test_worker_killed_in_a_trial_changes_nothing(sweep_file: Any, tmp_path: Path) -> None:
    """A finished trial has the bits of `train` with its values, and the sweep prints its table again."""
    file = sweep_file()
    worker = start_worker(file)
    metrics = tmp_path / "lr/trial_0000/metrics.jsonl"
    while not metrics.exists():
        assert worker.poll() is None, worker.communicate()[0]
        time.sleep(0.05)
    worker.kill()  # the training loses its parent, saves and exits
    worker.communicate()
    output = finish(start_worker(file))
    assert "trial_0000: optim.lr=0.01" in output
    assert "lr/best.yaml" in output
    overrides = ["data.val_size=100", "optim.lr=0.1", "name=alone"]
    train(tmp_path / "small.yaml", *overrides, cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/alone", tmp_path / "lr/trial_0001")
    train(tmp_path / "small.yaml", overrides[0], "optim.lr=0.01", "name=first", cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/first", tmp_path / "lr/trial_0000")
    run = open_sweep(file)
    assert [trial.state for trial in run.trials] == [TrialState.COMPLETE] * 2
    assert main([str(file)]) == 0  # finished: no training


@pytest.mark.fault
def test_diverging_trial_fails_and_the_others_are_trained(sweep_file: Any) -> None:
    search = {"optim.lr": {"choices": [1e30, 0.1]}}
    file = sweep_file(search=search, set={"data.val_size": 100, "run.epochs": 1})
    output = finish(start_worker(file))
    assert re.search(r"trial_0000 failed: step \d: not finite: ", output)
    states = [trial.state for trial in open_sweep(file).trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]


def test_broken_trial_ends_the_sweep_with_its_error(sweep_file: Any, tmp_path: Path) -> None:
    file = sweep_file(set={"data.val_size": 100, "data.path": "nowhere", "data.source": None})
    output = finish(start_worker(file), code=2)
    assert output.count("error:") == 1
    assert "error: trial_0000 failed: nowhere has no data" in output
    assert [trial.state for trial in open_sweep(file).trials] == [TrialState.RUNNING]


# ----------------------------------------------------------------------------- many kills


PRUNED = {
    "search": SPACE | {"augment.cutout": {"choices": [0, 8]}},
    "sampler": {"name": "random"},
    "trials": 27,
}


@pytest.mark.fault
def test_two_workers_prune_and_survive_twenty_kills(sweep_file: Any, tmp_path: Path) -> None:
    """27 trials with reduction factor 3: at most 40 % of the steps of the whole grid.

    An epoch takes seconds (96 px), since a worker prunes up to two seconds after an evaluation.
    """
    set_ = {
        "data.val_size": 100,
        "model.image_size": 96,
        "run.epochs": 9,
        "run.save_every_minutes": 0.01,
    }
    pruner = {"min_epochs": 1, "reduction_factor": 3}
    file = sweep_file(**PRUNED, set=set_, pruner=pruner)
    draws = random.Random(0)
    workers = [start_worker(file) for _ in range(2)]
    kills = 0
    while any(worker.poll() is None for worker in workers) or kills < 20:
        time.sleep(draws.uniform(2, 12))
        index = draws.randrange(2)
        if kills < 20:
            workers[index].kill()
            workers[index].communicate()
            kills += 1
        for index in range(2):
            if workers[index].poll() is not None:
                code = workers[index].returncode
                assert code in (0, -signal.SIGKILL), workers[index].communicate()[0]
                if kills < 20 or code:
                    workers[index] = start_worker(file)
        if kills >= 20 and all(worker.poll() == 0 for worker in workers):
            break
    output = finish(start_worker(file))
    run = open_sweep(file)
    assert len(run.trials) == 27
    assert all(trial.state.is_finished() for trial in run.trials), output
    assert not [trial for trial in run.trials if trial.state == TrialState.FAIL]
    epochs = [result.last_epoch for _, result in ranking(run)]
    steps = sum(last_step(run.trial_folder(number)) for number in range(27))
    whole = 27 * 9 * 10
    print(f"{steps} of {whole} steps ({100 * steps / whole:.0f} %), epochs {epochs}")
    assert steps <= 0.4 * whole
    compare_with_undisturbed(run, tmp_path, set_)
    finish(start_worker(file, "--continue-best", "3"))
    compare_with_undisturbed(run, tmp_path, set_)
    assert sum(result.last_epoch == 9 for _, result in ranking(run)) >= 3


@pytest.mark.fault
def test_ranking_of_a_killed_sweep_without_pruning_is_that_of_an_undisturbed_one(
    sweep_file: Any, tmp_path: Path
) -> None:
    killed, whole = (sweep_file(name, **PRUNED | {"trials": 6}) for name in ("killed", "whole"))
    finish(start_worker(whole))
    draws = random.Random(1)
    while open_unfinished(killed):
        worker = start_worker(killed)
        try:
            worker.communicate(timeout=draws.uniform(6, 25))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.communicate()
    tables = [format_table(open_sweep(file)) for file in (killed, whole)]
    assert tables[0] == tables[1]


def open_unfinished(file: Path) -> bool:
    run = open_sweep(file)
    return len(run.trials) < 6 or not all(trial.state.is_finished() for trial in run.trials)


def last_step(folder: Path) -> int:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max(record["step"] for record in records)


def compare_with_undisturbed(run: SweepFolder, tmp_path: Path, overrides: dict[str, Any]) -> None:
    """Train the values of each finished trial again, without a sweep, and compare the bits."""
    finished = [trial for trial, result in ranking(run) if result.last_epoch == 9]
    assert finished
    for trial in finished:
        alone = tmp_path / "runs" / f"alone_{trial.number}"
        if not alone.exists():
            words = [f"{key}={json.dumps(value)}" for key, value in values_of(trial).items()]
            words += [f"{key}={value}" for key, value in overrides.items()]
            train(tmp_path / "small.yaml", *words, f"name={alone.name}", cwd=tmp_path)
        assert_same_bits(alone, run.trial_folder(trial.number))
