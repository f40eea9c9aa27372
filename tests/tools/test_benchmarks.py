"""Benchmarks run at small size: their output, resuming and stopping."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import accuracy
import pytest
import report
import results_page
import shortened
import tables
from around import pickles_of, run_until_loss
from augmentations import AUGMENTATIONS, COLUMNS
from augmentations import main as draw_augmentations
from gpu import Gpu, floor_milliseconds
from input import TUTORIAL
from loops import EAGER, OURS
from PIL import Image

from cifar_dist.data.dataset import read_split
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.recipe.load import load_recipe
from cifar_dist.utils.errors import UserError
from recipes import RecipeMaker

BENCHMARKS = Path(accuracy.__file__).parent
SMALL = {"epochs": 1, "log_every_steps": 2}
LONG = {"epochs": 100_000, "eval_every_epochs": 100_000}


@pytest.fixture(autouse=True)
def run_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def run(*words: object) -> tuple[int, dict[str, Any] | None]:
    """Run accuracy.py and return its exit code and the content of its results file."""
    code = accuracy.main([str(word) for word in (*words, "--output", "results.json")])
    path = Path("results.json")
    return code, json.loads(path.read_text()) if path.exists() else None


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, or 0 if there is none."""
    names = [path.name for path in folder.glob("checkpoints/step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def test_accuracy_trains_each_recipe_and_seed_once(
    recipe: RecipeMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [recipe("one", run=SMALL), recipe("two", run=SMALL, optim={"lr": 0.01})]
    words = ["--budget", 10, "--seeds", "0,1", "--logs", "logs", "run.log_every_steps=3"]
    code, results = run(*paths, *words)
    assert code == 0
    assert results is not None
    assert [(row["recipe"], row["seed"]) for row in results["runs"]] == [
        ("one", 0),
        ("two", 0),
        ("one", 1),
        ("two", 1),
    ]
    for row in results["runs"]:
        log = Path("runs", row["name"], "metrics.jsonl").read_text()
        assert Path("logs", f"{row['name']}.jsonl").read_text() == log
        summary = json.loads(Path("runs", row["name"], "summary.json").read_text())
        assert {name: row[name] for name in ("top1", "top5", "seconds")} == {
            name: summary[name] for name in ("top1", "top5", "seconds")
        }
        assert row["epochs"] == 1
        assert {"hardware", "torch", "date", "commit", "peak_memory_bytes"} <= row.keys()
    first, second = (row["top5"] for row in results["runs"][::2])
    numbers = results["recipes"]["one"]
    assert numbers["n"] == 2
    assert numbers["top5"]["mean"] == pytest.approx((first + second) / 2)
    assert numbers["top5"]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))

    capfd.readouterr()
    before = Path("results.json").read_bytes()
    code, _ = run(*paths, "--budget", 10, "--seeds", "0,1")
    output = capfd.readouterr().out
    assert code == 0
    assert output.count("finished before") == 4
    assert "remain" not in output
    assert Path("results.json").read_bytes() == before
    with pytest.raises(
        UserError, match=r"one_seed0 with other settings \(optim\.lr: 0\.003 -> 0\.5\)"
    ):
        run(paths[0], "--budget", 10, "--seeds", "7", "optim.lr=0.5")
    with pytest.raises(UserError, match=r"other settings .*optim\.sam\.rho: None -> 0\.05"):
        run(paths[0], "--budget", 10, "--seeds", "7", "optim.sam={rho: 0.05}")
    code, _ = run(paths[0], "--budget", 0, "--seeds", "1,2", "run.log_every_steps=1")
    assert "1 of 2 runs remain: one_seed2" in capfd.readouterr().out


@pytest.mark.fault
def test_accuracy_resumes_an_interrupted_run(
    recipe: RecipeMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    path, folder = recipe("long", run=LONG), Path("runs/long_seed3")
    command: list[str | Path] = [
        sys.executable,
        BENCHMARKS / "accuracy.py",
        path,
        "--budget",
        "60",
        "--seeds",
        "3",
    ]
    with subprocess.Popen(
        [*command, "--output", "results.json"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "loss" in line and "images/s" in line and "Ctrl-C" not in output:
                output += "Ctrl-C\n"
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, output
    assert "1 of 1 runs remain: long_seed3; run the same command again to continue" in output
    first = saved_step(folder)
    assert first > 0, output
    assert not (folder / "lock").exists(), "the training has ended"

    for minutes in (0.25, 1, 4):  # start-up may be slow under load
        code, results = run(path, "--budget", minutes, "--least", 0, "--seeds", 3)
        output = capfd.readouterr().out
        assert code == 0
        assert results is None
        assert "1 of 1 runs remain" in output
        if saved_step(folder) > first:
            break
    assert saved_step(folder) > first
    assert f"resuming from step {first} of" in output


def test_accuracy_reports_failed_runs(
    recipe: RecipeMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe("broken", run=SMALL, model={"backbone": "no_such_net"})
    code, results = run(path, "--budget", 10, "--seeds", "0")
    assert code == 1
    assert results is None
    assert "1 of 1 runs failed: broken_seed0" in capfd.readouterr().out


def test_accuracy_reports_errors_before_training(recipe: RecipeMaker) -> None:
    path = recipe("one")
    with pytest.raises(UserError, match=r"did you mean run\.epochs"):
        run(path, "--budget", 10, "run.epoch=2")
    with pytest.raises(UserError, match="two recipes are named one"):
        run(path, path, "--budget", 10)
    with pytest.raises(UserError, match="--seeds a"):
        run(path, "--budget", 10, "--seeds", "a")
    Path("results.json").write_text("{}")
    with pytest.raises(UserError, match="not a results file"):
        run(path, "--budget", 10)
    assert not Path("runs").exists()


def test_study_rows_differ_and_share_a_validation_split(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--budget", "0", "--seeds", "0", "--output", "results.json"]
    assert shortened.main(words) == 0
    rows = [row for study in shortened.STUDIES.values() for row in study]
    assert f"{len(rows)} of {len(rows)} runs remain" in capfd.readouterr().out
    for study, study_rows in shortened.STUDIES.items():
        recipes = [
            (shortened.RECIPES / f"{recipe}.yaml", [*overrides, f"name={name}"])
            for name, (recipe, overrides) in study_rows.items()
        ]
        settings = [run.settings for run in accuracy.plan_runs(recipes, [0])]
        for row in settings:
            row.pop("name")
        assert all(row not in settings[:index] for index, row in enumerate(settings))
        assert {row["data.val_size"] for row in settings} == {5000 if study == "validation" else 0}
    with pytest.raises(UserError, match="no_row: not a study or row; choose from tutorial"):
        shortened.main([*words, "no_row"])


def finished_row(recipe: str, seed: int, top1: float, **more: float) -> dict[str, Any]:
    environment = {"hardware": "one core", "torch": "2.15.0", "commit": "0123456789"}
    return {
        "recipe": recipe,
        "seed": seed,
        "name": f"{recipe}_seed{seed}",
        "top1": top1,
        "top5": 2 * top1,
        "best_test_top1": top1 + 1,
        "epochs": 2,
        "seconds": 1000.0,
        "date": "2026-11-24T12:00:00",
        **environment,
        **more,
    }


@pytest.mark.parametrize("results", ["accuracy_cpu", "accuracy_cuda_h200"])
def test_committed_results_match_todays_recipes(results: str) -> None:
    """Finished runs are recognized: their settings have today's keys and values."""
    rows = accuracy.read_rows(BENCHMARKS / f"results/{results}.json")
    studies = {name: row for study in shortened.STUDIES.values() for name, row in study.items()}
    paths = {load_recipe(path).name: path for path in shortened.RECIPES.rglob("*.yaml")}
    for row in rows:
        name, overrides = row["recipe"], [f"run.epochs={row['epochs']:g}"]
        path = paths.get(name)
        if path is None:
            recipe, changes = studies[name]
            path, overrides = shortened.RECIPES / f"{recipe}.yaml", [*changes, f"name={name}"]
        overrides.append(f"run.precision={row['settings']['run.precision']}")
        (finished,) = accuracy.plan_runs([(path, overrides)], [row["seed"]])
        assert finished.is_in(rows), row["name"]


def test_results_page_names_existing_recipes() -> None:
    names = {load_recipe(path).name for path in shortened.RECIPES.rglob("*.yaml")}
    listed = {name for row in results_page.FULL_LENGTH for name in (row.ours, row.protocol)}
    assert listed - {""} <= names


def test_results_page_has_mean_std_and_empty_cells(tmp_path: Path) -> None:
    rows = [finished_row("r18_32", seed, top1) for seed, top1 in enumerate((78.0, 79.0, 80.0))]
    rows += [finished_row("resnet18_baseline", 0, 43.0), finished_row("short_baseline", 0, 20.0)]
    rows.append(finished_row("val_flip", 0, 30.0, val_top1=31.5))
    log = [{"kind": "eval", "epoch": 3, "top1": 10.0}, {"kind": "train", "epoch": 3, "top1": 50.0}]
    (tmp_path / "short_baseline_seed0.jsonl").write_text("\n".join(map(json.dumps, log)))
    (tmp_path / "short_baseline_seed1.jsonl").write_text(
        json.dumps({"kind": "eval", "epoch": 3, "top1": 20.0})
    )
    text = results_page.page_part(rows, tmp_path)
    (first,) = (line for line in text.splitlines() if "`r18_32`" in line)
    assert "| 44.26 | 44.00 | 43.00 | n = 1, 2 epochs, 1,000 s, one core | 78.43" in first
    assert "| 79.00 +- 1.00 | `r18_32` | n = 3, 2 epochs, 1,000 s, one core |" in first
    assert "| + label smoothing 0.1 | 44.81 |  |  |  |  |  |  |  |" in text
    assert "| `short_baseline` | 20.00 | 21.00 | 40.00 | n = 1, 2 epochs" in text
    assert "| row | n | 3 |\n| --- | ---: | ---: |\n| `short_baseline` | 2 | 15.0 |" in text
    assert "| `val_flip` | 31.50 | 30.00 |" in text
    assert "large_batch" not in text
    assert "torch 2.15.0; 2026-11-24; commit 0123456" in text
    svg = results_page.curves_svg(results_page.mean_curves("tutorial", tmp_path))
    assert "short_baseline" in "".join(ElementTree.fromstring(svg).itertext())


def test_long_curves_are_subsampled() -> None:
    curves = {
        "long": (1, {float(epoch): float(epoch) for epoch in range(1, 26)}),
        "short": (2, dict.fromkeys(map(float, range(1, 7)), 1.0)),
    }
    head, _, long, short = results_page.curves_table(curves).splitlines()
    assert head == "| row | n | 3 | 6 | 9 | 12 | 15 | 18 | 21 | 24 |"
    assert long == "| `long` | 1 | 3.0 | 6.0 | 9.0 | 12.0 | 15.0 | 18.0 | 21.0 | 24.0 |"
    assert short == "| `short` | 2 | 1.0 | 1.0 |  |  |  |  |  |  |"


def test_results_of_a_recipe_come_from_one_file(tmp_path: Path) -> None:
    files = {"cpu": ["short_ours", "short_fixed"], "cuda": ["r18_32"]}

    def write() -> None:
        for device, recipes in files.items():
            rows = [finished_row(recipe, 0, 50.0) for recipe in recipes]
            content = {"what": "accuracy", "runs": rows}
            (tmp_path / f"accuracy_{device}.json").write_text(json.dumps(content))

    write()
    read = results_page.read_all(tmp_path)
    assert [row["recipe"] for row in read] == ["r18_32", "short_ours", "short_fixed"]
    files["cuda"].append("short_ours")
    write()
    recipes = [row["recipe"] for row in results_page.read_all(tmp_path)]
    assert recipes == ["r18_32", "short_ours", "short_fixed"], "GPU runs replace CPU runs"
    files["other"] = ["short_fixed"]
    write()
    with pytest.raises(
        UserError, match=r"cpu\.json and .*other\.json both contain runs of short_fixed"
    ):
        results_page.read_all(tmp_path)


def test_two_processes_can_add_to_one_results_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    accuracy.add_row(path, finished_row("one", 0, 50.0, images_per_second=1.0))
    rows = accuracy.add_row(path, finished_row("two", 0, 60.0, images_per_second=1.0))
    assert [row["recipe"] for row in rows] == ["one", "two"]
    assert accuracy.read_rows(path) == rows


def test_augmentations_draws_a_grid() -> None:
    assert draw_augmentations(["--output", "sheet.png"]) == 0
    with Image.open("sheet.png") as sheet:
        colors = sheet.convert("RGB").getcolors(1 << 20)
        assert sheet.height > 20 * 64
        assert sheet.width > COLUMNS * 64
    assert colors is not None
    assert len(colors) > 10_000


def run_script(script: str, *words: str | Path) -> tuple[str, Any]:
    """Run a benchmark and return its output and its results file."""
    process = subprocess.run(
        [sys.executable, BENCHMARKS / script, *words, "--output", "results.json"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(Path("results.json").read_text())


@pytest.mark.fault  # slow: every loader of the other libraries
def test_input_reports_every_row(middle_data: Path) -> None:
    quick = ["--rounds", "1", "--seconds", "0.05"]
    printed, numbers = run_script("input.py", "--data", middle_data, *quick)
    assert numbers["threads"] == 1
    assert {"hardware", "cores", "torch", "date", "commit"} <= numbers.keys()
    assert len(numbers["data_path"]) == 11
    assert len(numbers["null_model_loop"]) == 9
    for row in numbers["augmentations"]:
        assert row["name"] in printed
        assert row["images_per_cpu_second"]["least"] > 0
    assert [row["name"] for row in numbers["augmentations"]] == list(AUGMENTATIONS)[1:]
    assert len(numbers["host_augmentation"]) == 3
    for row in numbers["host_augmentation"]:
        assert row["name"] in printed
        assert row["images_per_second"]["least"] > 0
    for row in numbers["data_path"] + numbers["null_model_loop"]:
        assert row["name"] in printed
        for value in (row["images_per_second"], row["times_the_tutorial"]["by_cpu"]):
            assert 0 < value["least"] <= value["median"] <= value["most"]
    assert numbers["step_milliseconds"]["ours"]["median"] > 0


def test_lengths_sums_the_epochs_of_each_image_size(recipe: RecipeMaker) -> None:
    """One of four epochs is at 16 px. No pretrained weights are downloaded."""
    resize = {"start": 16, "epochs": 2, "multiple": 16}
    path = recipe(model={"progressive_resize": resize, "pretrained": True})
    quick = ["--rounds", "3", "--seconds", "0", "--batch", "2"]
    printed, content = run_script("lengths.py", path, *quick)
    assert {"hardware", "torch", "date", "commit"} <= content["machine"].keys()
    row = content["recipes"]["tiny"]
    assert row["epochs"] == {"16": 1, "32": 3}
    rates = {size: rate["median"] for size, rate in row["images_per_second"].items()}
    assert row["seconds"] == pytest.approx(50_000 / rates["16"] + 150_000 / rates["32"])
    assert "| `tiny`, fp32 | " in printed


@pytest.mark.fault
def test_gpu_check_runs_on_a_cpu(tmp_path: Path, data: Path) -> None:
    """The script writes the same JSON as on a GPU, with tiny networks; GPU tests fail."""

    def check(part: str, *options: object, code: int = 0) -> tuple[str, dict[str, Any]]:
        command = [BENCHMARKS / "gpu_check.sh", part, "--output", tmp_path / "check", *options]
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=environment
        )
        assert process.returncode == code, process.stdout + process.stderr
        content = json.loads((tmp_path / f"check/gpu_check_{part}.json").read_text())
        assert {"hardware", "packages", "date", "commit"} <= content["machine"].keys()
        return process.stdout, content

    gpu_tests = (BENCHMARKS.parent / "tests/training/test_gpu.py").read_text()
    match = re.search(r"^def (test_\w+)\(accelerator: Accelerator\)", gpu_tests, re.MULTILINE)
    assert match
    printed, content = check("a", "--only", match[1], code=1)
    (result,) = content["tests"].values()
    assert result["exit_code"] == 1
    assert "1 error" in printed, "the end of the log: there is no GPU"

    tiny = ["model.backbone=test_resnet", "run.batch_size=16", "run.precision=fp32"]
    row = "tutorial's ResNet-18, fp32"
    printed, content = check("b", "--only", row, "--seconds", "0", "--set", *tiny)
    assert content["steps"][row]["milliseconds"] > content["steps"][row]["host_milliseconds"] > 0

    tiny += [
        "model.stem=imagenet",
        "model.whiten=false",
        "model.progressive_resize=null",
        "run.epochs=1",
    ]
    tiny += ["optim.schedule=constant", "optim.warmup_epochs=0", "run.eval_every_epochs=1"]
    printed, content = check("c", "--data", data, "--set", *tiny)
    assert [run["summary"]["finished"] for run in content["runs"].values()] == [True, True]
    assert "top1" in printed


PAGE = "before\n\n<!-- tables: begin -->\nold\n<!-- tables: end -->\n\nafter\n"


@pytest.mark.fault
def test_report_measures_all_targets_and_writes_the_page(middle_data: Path) -> None:
    Path("page.md").write_text(PAGE)
    command: list[str | Path] = [sys.executable, BENCHMARKS / "report.py", "--data", middle_data]
    command += ["--output", "speed_cpu.json", "--page", "page.md", "--backbone", "test_resnet"]
    few = ["--rounds", "1", "--seconds", "0.01"]
    quick = [name for name in report.MEASUREMENTS if name not in ("start_up", "loops_224")]
    process = subprocess.run(
        [*command, *few, "--only", *quick], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("speed_cpu.json").read_text())
    assert list(results["measurements"]) == quick
    for measured in results["measurements"].values():
        assert measured["threads"] == 1
        assert {"hardware", "cores", "torch", "date", "commit", "load"} <= measured.keys()
        for turns in measured["turns"].values():
            assert turns
            assert min(min(turn) for turn in turns) > 0
    assert results["measurements"]["ddp"]["facts"]["world_size"] == 2
    for target in tables.TARGETS:
        if target.device == "cpu":
            assert target.value(results), target.what

    page = Path("page.md").read_text()
    assert page.startswith("before\n\n<!-- tables: begin -->")
    assert page.endswith("<!-- tables: end -->\n\nafter\n")
    assert "old" not in page.splitlines()
    turns = results["measurements"]["null_loop"]["turns"]
    times = tables.format_number(turns["ours"][0][1] / turns[TUTORIAL][0][1])  # CPU time, one round
    assert f"null-model loop: ours / tutorial | 4 | 8 | {times} ({times} - {times}) |  |" in page

    assert report.main(["--tables", "--output", "speed_cpu.json", "--page", "page.md"]) == 0
    assert Path("page.md").read_text() == page
    with pytest.raises(UserError, match="has backbone test_resnet"):
        report.main(["--data", str(middle_data), "--output", "speed_cpu.json"])
    Path("page.md").write_text("no marks")
    with pytest.raises(UserError, match="must contain the lines"):
        report.main(["--tables", "--output", "speed_cpu.json", "--page", "page.md"])


def test_gpu_tables_have_step_columns() -> None:
    """Two steps of 250 images take 1 ms and 2 ms; the floor is 0.3 ms."""
    stamp = {"hardware": "a GPU", "cores": 16, "date": "today", "commit": "0", "torch": "2"}
    step = {"batch_size": 250, "kernels": 40, "memory_bytes": 2**30, "floor_milliseconds": 0.3}
    measured = {
        **(stamp | {"rounds": 2, "load": 0.0, "unit": "images"}),
        "facts": {"batch_size": 250, "steps": {OURS: step}},
        "turns": {OURS: [[250_000, 1e6], [125_000, 1e6]], EAGER: [[50_000, 1e6], [50_000, 1e6]]},
    }
    results = {
        "device": "cuda",
        "machine": stamp,
        "backbone": "resnet18",
        "measurements": {"loops_32": measured},
    }
    page = tables.page_part([results])
    assert "ms per step (H200) | 1.5 | 0.7 | 1.5 (1 - 2) |" in page
    assert "CUDA graphs / eager (H200) | 3 | 6 | 3.75 (2.5 - 5) |" in page
    assert (
        f"| {OURS} | 187,500 (125,000 - 250,000) | 1,000,000 | 1.5 | 0.3 | 20 % | 40 | 1,024 |"
        in page
    )
    assert f"| {EAGER} | 50,000 (50,000 - 50,000) | 1,000,000 |  |  |  |  |  |" in page


def test_run_until_loss_stops_at_the_first_loss(recipe: RecipeMaker) -> None:
    path = recipe("endless", run=LONG | {"log_every_steps": 1})
    assert run_until_loss(Path.cwd(), "-m", "cifar_dist.train", path)() == 1
    with pytest.raises(RuntimeError, match="all is well"):
        run_until_loss(Path.cwd(), "-c", "print('all is well')")()


def test_pickles_have_python_2_strings(middle_data: Path, tmp_path: Path) -> None:
    """One peer reads strings as bytes, the other as text."""
    raw = read_split(middle_data, "train")
    file = pickles_of(middle_data, tmp_path) / "train"
    for encoding, key in (("bytes", b"data"), ("latin1", "data")):
        content = pickle.loads(file.read_bytes(), encoding=encoding)
        assert (content[key] == raw.images).all()


def test_floor_of_resnet18() -> None:
    """At 32 px: 30 million multiply-adds per image (37 with padding) and 11.2 million weights."""
    config = ModelConfig(backbone="resnet18", image_size=32)
    compute = floor_milliseconds(config, 250, Gpu(1e12, 1e30))
    assert compute == pytest.approx(1000 * 3 * 2 * 30.1e6 * 250 / 1e12, rel=0.02)
    update = floor_milliseconds(config, 0, Gpu(1e30, 1e12))
    assert update == pytest.approx(1000 * 28 * 11.23e6 / 1e12, rel=0.01)
