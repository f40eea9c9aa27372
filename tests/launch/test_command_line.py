"""The console script `cifar-dist`, its local launcher, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from accelerate import Accelerator

from cifar_dist import cli
from cifar_dist.distributed import signals
from cifar_dist.recipe.load import load_recipe
from cifar_dist.run_folder.checkpoint import checkpoints, find_corruption
from cifar_dist.train import train
from cifar_dist.training import pace
from cifar_dist.utils.cli import parse_recipe, train_parser
from cifar_dist.utils.errors import INTERRUPTED, UserError
from cifar_dist.utils.recipe_files import RECIPES, recipe_names
from recipes import RecipeMaker

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "cifar_dist.cli"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def test_launcher_passes_on_success_errors_and_nothing_else(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(run={"epochs": 1})
    process = start("train", path, "--processes", "2", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["world_size"] == 2
    assert "Warning" not in output

    process = start("train", "--processes=2", path, "run.epochs=2", "--jsn", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert output.endswith(f"{error}\n"), "the error is the last line"
    assert "Traceback" not in output


@needs_proc
def test_ctrl_c_saves_and_says_so_once(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(run={"epochs": 2000})
    process = start("train", path, "--processes", "2", cwd=tmp_path)
    wait_until((tmp_path / "runs/tiny/metrics.jsonl").exists, process)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if "saving after this step; press Ctrl-C again to quit now" in line:
            break
    assert time.monotonic() - sent < 1
    output = process.stdout.read()
    assert process.wait(timeout=60) == signals.STOPPED
    assert "saving after this step" not in output
    assert "stopped by SIGINT" in output
    (saved,) = checkpoints(tmp_path / "runs/tiny/checkpoints")
    assert find_corruption(saved) is None


@pytest.mark.fault
@needs_proc
def test_ranks_stop_if_the_launcher_is_killed(tmp_path: Path, recipe: RecipeMaker) -> None:
    process = start("train", recipe(run={"epochs": 2000}), "--processes", "2", cwd=tmp_path)
    wait_until((tmp_path / "runs/tiny/metrics.jsonl").exists, process)
    ranks = children(process)
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=60)  # until the last rank closes its output
    assert (tmp_path / "runs/tiny/stopped").read_text() == "SIGTERM\n"
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in ranks)


@pytest.mark.fault
@needs_proc
def test_killed_rank_ends_the_launch_with_its_signal(tmp_path: Path, recipe: RecipeMaker) -> None:
    process = start("train", recipe(run={"epochs": 2000}), "--processes", "2", cwd=tmp_path)
    wait_until((tmp_path / "runs/tiny/metrics.jsonl").exists, process)
    os.kill(children(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 was ended by SIGKILL; check the machine's memory" in output


@needs_proc
@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_ctrl_c_during_imports_leaves_no_traceback_and_no_folder(
    tmp_path: Path, recipe: RecipeMaker, command: str
) -> None:
    path = recipe()
    process = start(command, path if command == "train" else "runs/tiny", cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_run_stopped_before_its_first_step_leaves_no_folder(
    tmp_path: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signals, "_received", [(signal.SIGINT, time.monotonic())])
    config = load_recipe(recipe(), ["tracking.mode=off"])
    summary = train(config, Accelerator(cpu=True))
    assert summary["steps"] == 0
    assert not config.folder.exists()


def test_second_ctrl_c_quits_and_a_forwarded_duplicate_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "_received", [])
    signals._record(signal.SIGINT, None)
    signals._record(signal.SIGINT, None)
    assert capfd.readouterr().err.count("press Ctrl-C again") == 1
    assert signals.stop_signal() == signal.SIGINT
    early = time.monotonic() - signals.DUPLICATE_SECONDS
    monkeypatch.setattr(signals, "_received", [(signal.SIGINT, early)])
    with pytest.raises(KeyboardInterrupt):
        signals._record(signal.SIGINT, None)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("cifar_dist.cli --help", 0),
        ("cifar_dist.cli recipes", 0),
        ("cifar_dist.train --version", 0),
        ("cifar_dist.train recipes/debig.yaml", 2),
        ("cifar_dist.runs absent", 2),
        *((f"cifar_dist.{name} --help", 0) for name in cli.COMMANDS),
    ],
)
def test_answers_without_importing_torch(arguments: str, code: int) -> None:
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended: code = ended.code or 0\n"
        "slow = {'torch', 'numpy', 'pydantic', 'datasets'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stderr


def test_every_command_module_is_listed() -> None:
    modules = {path.stem for path in (ROOT / "cifar_dist").glob("*.py")}
    assert set(cli.COMMANDS) == modules - {"__init__", "api", "cli"}


def test_recipes_are_listed_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    assert not any("$schema" in line for line in lines)  # the first line of each file
    assert {path.stem for path in RECIPES.rglob("*.yaml")} == {
        Path(name).name for name in recipe_names()
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "debug"], "trian: unknown command; did you mean train?"),
        (["train", "debug", "--processes"], "--processes needs a number of at least 1, or auto"),
        (["train", "debug", "--processes=0"], "--processes needs a number of at least 1, or auto"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        cli.run(words)


@pytest.mark.parametrize("name", ["debug", str(ROOT / "recipes/debug.yaml")])
def test_recipe_by_name_or_path_and_words_in_any_order(name: str) -> None:
    words = ["run.epochs=3", "--dry-run", name, "run.seed=1"]
    options = parse_recipe(train_parser(), words)
    assert options.recipe.samefile(ROOT / "recipes/debug.yaml")
    assert options.overrides == ["run.epochs=3", "run.seed=1"]
    with pytest.raises(UserError, match="give one recipe"):
        parse_recipe(train_parser(), [*words, name])


@pytest.mark.parametrize(
    ("asked", "words", "gpus", "processes"),
    [
        ("auto", ["r18_32"], 8, 4),  # run.micro_batches
        ("auto", ["run.micro_batches=2", "r18_32"], 8, 2),
        ("auto", ["r18_32"], 2, 2),
        ("auto", ["r18_32", "run.micro_batches=1", "--json"], 0, 1),
        ("auto", [], 3, 3),
        ("auto", ["--fork", "runs/r18_32", "name=new", "r18_32"], 8, 4),
        ("auto", ["runs/a"], 3, 3),
        ("auto", ["runs/a", "--cifair", sys.executable], 3, 3),  # a binary file
        ("auto", ["r18_32", "run.micro_batches=many"], 3, 3),
        ("3", ["r18_32"], 0, 3),
    ],
)
def test_number_of_processes(asked: str, words: list[str], gpus: int, processes: int) -> None:
    assert cli.choose_processes(asked, words, gpus) == processes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time"], "--time and --json need --dry-run"),
        (["--json"], "--time and --json need --dry-run"),
        (["--dry-run", "--fork", "runs/a"], "--dry-run cannot be combined with --fork"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(train_parser(), ["debug", *options])


def test_dry_run_measures_the_time(tmp_path: Path, recipe: RecipeMaker) -> None:
    process = start("train", recipe(), "--dry-run", "--time", "--json", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    plan = json.loads(output)
    assert 0.1 < plan["steps_per_second"] < 10_000
    assert not (tmp_path / "runs").exists()


def test_time_left_is_logged_once(
    tmp_path: Path,
    recipe: RecipeMaker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pace, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(pace, "MEASURE_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cifar_dist.utils.log.log.propagate", True)
    monkeypatch.setattr(
        "cifar_dist.utils.log.log.handlers", []
    )  # pytest may add caplog's here, too
    with caplog.at_level("INFO", logger="cifar_dist"):
        train(load_recipe(recipe(), ["tracking.mode=off"]), Accelerator(cpu=True))
    (line,) = [line for line in caplog.messages if " left at " in line]
    assert line.startswith("about ")
    assert line.endswith(" images/s, without evaluations")


def test_pace_excludes_the_first_steps() -> None:
    meter = pace.Pace()
    times = {0: 0.0, 1: 100.0, 2: 100.1, 3: 100.2, 4: 102.2, 5: 104.2, 6: 106.2}  # slow first step
    speeds = [meter.steps_per_second(step, now) for step, now in times.items()]
    assert speeds == [None] * 6 + [pytest.approx(0.5)]
    assert meter.steps_per_second(7, 108.0) is None
