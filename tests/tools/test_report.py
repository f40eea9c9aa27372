"""Tests of the `report` command: groups of seeds, paired tests and a self-contained page."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Launch, train
from safetensors.torch import load_file
from small_data import quick_recipe
from stored_runs import replace_predictions

from cifar_dist.data.dataset import OFFICIAL_DIGEST, write_dataset
from cifar_dist.data.ingest.pickles import RawMeta
from cifar_dist.data.ingest.synthetic import draw_synthetic
from cifar_dist.inference.stored_run import read_run
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.report import main
from cifar_dist.reporting.charts import MAX_POINTS, Series, line_chart, number, thinned, ticks
from cifar_dist.reporting.comparison import group_runs, latex_table, latex_text, paired_tests
from cifar_dist.reporting.page import render_page
from cifar_dist.reporting.tutorial import PUBLISHED, compare_with_published
from cifar_dist.reporting.watch import watch
from cifar_dist.run_folder.find import find_runs
from cifar_dist.utils.errors import UserError

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def hostile_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return synthetic data with HTML in the names of a class and a superclass."""
    train_rows, test_rows, meta = draw_synthetic(train_per_class=1, test_per_class=1)
    names = RawMeta(
        fine_label_names=[HOSTILE, *meta.fine_label_names[1:]],
        coarse_label_names=[f'"><img src=x onerror=1>{HOSTILE}', *meta.coarse_label_names[1:]],
    )
    root = tmp_path_factory.mktemp("hostile") / "data"
    write_dataset(root, train_rows, test_rows, names, content="other")
    return root


class Page(HTMLParser):
    """Collect elements, URLs and event handlers, and check that all elements are closed."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, hostile_data: Path) -> Path:
    """Return two seeds of one recipe, a run of another recipe, and an unfinished run."""
    folder = tmp_path_factory.mktemp("report")
    for name, seed, lr in (("tiny_s0", 0, 0.003), ("tiny_s1", 1, 0.003), ("other", 0, 0.01)):
        seeded: dict[str, Any] = {"run": {"seed": seed}, "optim": {"lr": lr}}
        train(quick_recipe(folder, name, hostile_data, **seeded), cwd=folder)
    unfinished = folder / "runs/unfinished"
    unfinished.mkdir()
    text = (folder / "runs/other/recipe.yaml").read_text()
    (unfinished / "recipe.yaml").write_text(text.replace("name: other", "name: unfinished"))
    return folder / "runs"


@pytest.fixture
def runs(tmp_path: Path, trained: Path) -> Path:
    """Return a copy that a test may modify."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.mark.parametrize(("key", "value"), [("teachers", ["f" * 64]), ("data", "f" * 64)])
def test_runs_with_other_teachers_or_data_are_no_seeds(
    runs: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folders = [str(runs / name) for name in ("tiny_s0", "tiny_s1")]
    latex = tmp_path / "table.tex"
    arguments = [*folders, "--output", str(tmp_path / "page.html"), "--latex", str(latex)]
    assert main(arguments) == 0
    assert latex.read_text().count("\\\\") == 2  # the header and one row
    path = runs / "tiny_s1/environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert main(arguments) == 0
    assert latex.read_text().count("\\\\") == 3
    assert ("on other data" in latex.read_text()) is (key == "data")


def test_device_hours_count_the_processes_of_each_start(run: Path) -> None:
    """One hour on eight processes and one on two, of which the summary has only the last number."""
    path = run / "summary.json"
    summary = json.loads(path.read_text()) | {"seconds": 7200.0, "world_size": 2}
    for device_seconds, hours in ((36000.0, 10.0), (None, 4.0)):
        stored = {"device_seconds": device_seconds} if device_seconds else {}
        path.write_text(
            json.dumps({k: v for k, v in summary.items() if k != "device_seconds"} | stored)
        )
        assert read_run(run).device_hours == hours
    path.write_text(json.dumps(summary | {"device_seconds": "10"}))
    with pytest.raises(UserError, match=r"summary\.json is damaged \(device_seconds"):
        read_run(run)


def test_page_is_self_contained_and_groups_are_compared(runs: Path, hostile_data: Path) -> None:
    output, latex = runs / "page.html", runs / "table.tex"
    folders = [str(runs / name) for name in ("tiny_s0", "tiny_s1", "other", "unfinished")]
    assert main([*folders, "--output", str(output), "--latex", str(latex), "--tutorial"]) == 0
    text = output.read_text()
    page = Page(text)
    assert not page.open
    assert "script" not in page.elements
    assert not page.handlers
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text  # the class name, escaped
    images = [address for address in page.addresses if not address.startswith("#")]
    assert images
    assert all(address.startswith("data:image/webp;base64,") for address in images)
    anchors = [address[1:] for address in page.addresses if address.startswith("#")]
    assert len(anchors) >= 6
    assert set(anchors) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    assert "default-src 'none'" in text
    assert "unfinished (not finished)" in text
    text = text.replace("<wbr>", "")  # line break opportunities in long names
    assert all(row.config in text for row in PUBLISHED)

    first, second = group_runs([read_run(Path(folder)) for folder in folders])
    assert (first.label, len(first.runs), second.label) == ("tiny", 2, "other")
    top1 = [json.loads((run.folder / "summary.json").read_text())["top1"] for run in first.runs]
    assert first.mean("top1") == pytest.approx(statistics.fmean(top1))
    assert first.std("top1") == pytest.approx(statistics.stdev(top1))
    assert second.std("top1") is None
    assert second.config_diff == ("optim.lr: 0.003 → 0.01",)
    assert [run.device_hours for run in second.runs] == [
        json.loads((runs / "other/summary.json").read_text())["device_seconds"] / 3600
    ]
    (test,) = paired_tests([first, second])  # the common seed
    assert test.seed == 0
    correct = []
    for name in ("tiny_s0", "other"):
        tensors = load_file(runs / name / "predictions.safetensors")
        correct.append(tensors["logits"].argmax(1) == tensors["labels"])
    assert test.difference == pytest.approx(
        100 * float(correct[1].float().mean() - correct[0].float().mean()), abs=1e-4
    )
    assert latex.read_text().count("\\\\") == 3
    assert "tiny & 2 &" in latex.read_text()


def test_copy_is_skipped_and_repeated_seed_gives_a_notice(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(runs / "tiny_s0", runs / "again"))
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("name: tiny_s0", "name: tiny"))
    folders = [str(runs / name) for name in ("tiny_s0", "tiny_s1", "again")]
    notice, output = "tiny: 3 runs, but 2 seed(s)", tmp_path / "page.html"
    assert main([*folders, "--output", str(output)]) == 0
    message = f"skipped: {copy} has the same weights as {runs / 'tiny_s0'}"
    assert message in capsys.readouterr().out
    assert notice not in output.read_text()
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"weights": "of other hardware"}))
    assert main([*folders, "--output", str(output)]) == 0
    assert notice in output.read_text()


@pytest.mark.parametrize(
    ("name", "other", "label"),
    [
        ("net_s0", "net_s1", "net"),
        ("nets0", "net-seed1", "net"),
        ("s0", "s1", "s0"),  # nothing would be left
        ("vit_s_224", "vit_s_224_b", "vit_s_224"),  # not the run's seed
        ("net_s1", "net_s0", "net_s1"),
    ],
)
def test_label_of_seeds_drops_only_the_seed_of_the_run(
    runs: Path, name: str, other: str, label: str
) -> None:
    folders = [runs / "tiny_s0", runs / "tiny_s1"]
    for folder, new in zip(folders, (name, other), strict=True):
        path = folder / "recipe.yaml"
        path.write_text(path.read_text().replace(f"name: {folder.name}", f"name: {new}"))
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert (group.label, len(group.runs)) == (label, 2)


def test_page_lists_losses_and_teacher_of_a_student(
    tmp_path: Path, runs: Path, hostile_data: Path
) -> None:
    student = quick_recipe(
        tmp_path,
        "student",
        hostile_data,
        model={"head": "cosine"},
        losses={"arcface": {"scale": 8}, "distill": {"weight": 0.5}},
        teacher={"run": str(runs / "other")},
    )
    train(student, cwd=tmp_path)
    output = tmp_path / "page.html"
    assert main([str(runs / "student"), str(runs / "other"), "--output", str(output)]) == 0
    text = output.read_text()
    assert "arcface: {weight: 1.0, scale: 8.0" in text
    assert f"# teacher {runs / 'other'}: SHA-256 " in text
    assert "head: cosine" in text
    assert f"<li>distilled from {runs / 'other'}</li>" in text


def test_page_without_data_has_metrics_but_no_images(runs: Path, data: Path) -> None:
    output = runs / "page.html"
    (runs / "other").rename(runs / "<i>other")
    record = {"kind": "train", "step": 1, "epoch": 0.1, "loss": "not a number", "lr": None}
    with (runs / "<i>other/metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert main([str(runs / "<i>other"), "--output", str(output), "--data", str(data)]) == 0
    text = output.read_text()
    assert "<i>" not in text
    assert f"{data} is other data" in text
    assert "95 % interval" in text
    assert "<img" not in text


def test_missing_data_is_one_warning_on_the_terminal_and_a_notice(
    runs: Path,
    hostile_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("tiny_s0", "tiny_s1", "other"):
        path = runs / name / "recipe.yaml"
        path.write_text(path.read_text().replace(str(hostile_data), "data/elsewhere"))
    monkeypatch.chdir(runs)
    assert main(["tiny_s0", "tiny_s1", "other"]) == 0
    notice = (
        "no classes, confusions and images of tiny, other: there is no data in data/elsewhere "
        f"(relative to {runs}); give its folder with --data FOLDER"
    )
    warning, saved = capsys.readouterr().out.splitlines()
    assert warning == notice
    assert saved.startswith("saved report.html")
    assert notice in Path("report.html").read_text()


def test_other_folders_are_skipped(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "empty").mkdir()
    (runs / "notes.txt").touch()
    folders = [str(runs / name) for name in ("empty", "notes.txt", "other")]
    assert main([*folders, "--output", str(tmp_path / "page.html")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped:")]
    assert lines == [f"skipped: {runs / 'empty'} is not a run folder (no recipe.yaml in it)"]
    with pytest.raises(UserError, match="none of these is a run folder"):
        main([str(runs / "empty"), str(runs / "notes.txt")])
    with pytest.raises(UserError, match="typo is not a run folder"):
        main([str(runs / "other"), str(runs / "typo")])


def test_damaged_runs_are_refused(runs: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        main([str(runs / "nothing")])
    (runs / "other/predictions.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"predictions\.safetensors is damaged"):
        main([str(runs / "other")])
    for logits, labels in (
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int8)),
        (torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.int64)),
    ):
        replace_predictions(runs / "other", {"logits": logits, "labels": labels})
        with pytest.raises(UserError, match=r"predictions\.safetensors is damaged"):
            main([str(runs / "other")])
    (runs / "other/predictions.safetensors").unlink()
    summary = runs / "other/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"seconds": None}))
    with pytest.raises(UserError, match=r"summary\.json is damaged \(seconds is not a number\)"):
        main([str(runs / "other")])


def test_runs_on_other_data_with_the_same_labels_are_not_compared(runs: Path) -> None:
    first, second = (read_run(runs / name) for name in ("tiny_s0", "other"))
    assert len(paired_tests(group_runs([first, second]))) == 1
    second = replace(second, environment=second.environment | {"data": "0123"})
    assert paired_tests(group_runs([first, second])) == []


def test_runs_with_different_labels_are_not_compared(runs: Path) -> None:
    tensors = load_file(runs / "other/predictions.safetensors")
    flipped = {"labels": tensors["labels"].flip(0).contiguous()}
    replace_predictions(runs / "other", tensors | flipped)
    groups = group_runs([read_run(runs / name) for name in ("tiny_s0", "other")])
    assert paired_tests(groups) == []


def test_command_writes_the_default_output(runs: Path) -> None:
    launch = Launch("cifar_dist.report", ["runs/other"], cwd=runs.parent)
    assert launch.wait() == [0], launch.output
    assert "report.html: 1 run(s)" in launch.output


def test_watched_page_is_short_until_all_runs_have_finished(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, folder = tmp_path / "page.html", runs / "other"
    finished = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    pages: list[str] = []

    def find() -> list[Path]:
        if output.exists():
            pages.append(output.read_text())
            (folder / "summary.json").write_text(finished)  # the training ends
        return find_runs([runs / "empty", runs / "tiny_s0", folder])

    (runs / "empty").mkdir()
    read = watch(find, render_page, output, seconds=0.01)
    assert [run.is_finished for run in read] == [True, True]
    assert 'http-equiv="refresh"' in pages[0]
    assert "other (not finished)" in pages[0]
    assert capsys.readouterr().out.count("skipped:") == 1


def test_interrupted_watch_writes_the_whole_page(runs: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cifar_dist.report",
        "runs/unfinished",
        "runs/other",
        "--watch",
    ]
    page = runs.parent / "report.html"
    process = subprocess.Popen(
        command,
        cwd=runs.parent,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    try:
        while not page.exists() and process.poll() is None:
            time.sleep(0.1)
        assert 'http-equiv="refresh"' in page.read_text()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert 'http-equiv="refresh"' not in page.read_text()
    assert "Reproduce" in page.read_text()
    assert "report.html: 2 run(s)" in output


def test_ticks_are_round_and_lines_are_thinned() -> None:
    assert ticks(0.13, 0.87) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    assert ticks(-2, 1) == pytest.approx([-2, -1, 0, 1])
    assert [number(value) for value in (0.25, 0, 1e-5, 12, 1200)] == [
        "0.25",
        "0",
        "1e-05",
        "12",
        "1,200",
    ]
    points = [(float(x), 0.0) for x in range(1000)]
    thin = thinned(points)
    assert (len(thin), thin[0], thin[-1]) == (MAX_POINTS, points[0], points[-1])
    assert line_chart([Series(name="a", group=0, points=[])], x_label="x", y_label="y") is None
    chart = line_chart([Series(name=HOSTILE, group=9, points=[(1, 2)])], x_label="x", y_label="y")
    assert chart is not None
    assert HOSTILE not in chart
    assert "c1 dash1" in chart


def test_latex_special_characters_are_escaped() -> None:
    assert latex_text("a_b & 5 % \\x") == r"a\_b \& 5 \% \textbackslash{}x"
    assert latex_table([]).startswith("% needs")


def test_tutorial_rows_show_runs_of_their_recipe_on_cifar_100(runs: Path) -> None:
    """The recipe and the data decide, not the name of the run."""
    folder, recipes = runs / "tiny_s0", Path(__file__).parents[2] / "recipes"
    tiny = load_recipe(folder / "recipe.yaml")
    environment, summary = folder / "environment.json", folder / "summary.json"
    data = json.loads(environment.read_text())

    def shown(recipe: Recipe, digest: str, micro_batches: int) -> set[str]:
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        environment.write_text(json.dumps(data | {"data": digest}))
        content = json.loads(summary.read_text()) | {"micro_batches": micro_batches}
        summary.write_text(json.dumps(content))
        rows = compare_with_published(group_runs([read_run(folder)]))
        assert all(row.protocol_best is None or row.protocol_last is not None for row in rows)
        return {row.row.config for row in rows if row.ours or row.protocol_best}

    ours = load_recipe(recipes / "r18_32.yaml", ["name=mine", "run.seed=7", "run.threads=1"])
    rows_of_ours = {row.config for row in PUBLISHED if row.ours == "r18_32"}
    assert shown(ours, OFFICIAL_DIGEST, 4) == rows_of_ours
    assert shown(ours, OFFICIAL_DIGEST, 2) == set()
    assert shown(ours, data["data"], 4) == set()
    assert shown(replace(tiny, name="r18_32"), OFFICIAL_DIGEST, 4) == set()
    protocol = load_recipe(recipes / "tutorial/resnet18_augment.yaml", ["name=mine"])
    assert shown(protocol, OFFICIAL_DIGEST, 1) == {"resnet18_augment"}
    output = runs / "page.html"
    assert main([str(folder), "--tutorial", "--output", str(output)]) == 0
    assert '<span class="detail">n = 1, 1 epoch</span>' in output.read_text()


def test_tutorial_rows_and_page_name_existing_recipes() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    assert {row.config for row in PUBLISHED} == {
        path.stem for path in recipes.glob("tutorial/*.yaml")
    }
    for row in PUBLISHED:
        for name in filter(None, (f"tutorial/{row.config}", row.ours)):
            settings = load_recipe(recipes / f"{name}.yaml").run
            assert settings.micro_batches, name  # runs are compared with these values
            assert settings.precision != "auto", name
    page = (recipes.parent / "docs/tutorial.md").read_text()
    for row in PUBLISHED:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{row.config}` |"))
        assert row.published is None or f"{row.published:.2f}" in line
        assert row.ours is None or f"`{row.ours}`" in line
    for name in re.findall(r"recipes/([\w/]+\.yaml)", page):
        assert (recipes / name).exists(), name


def test_tutorial_commands_train_teachers_before_students() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs/tutorial.md").read_text()
    loops = page.partition("python -m cifar_dist.report")[0].split("for recipe in ")[1:]
    assert loops
    names = " ".join(loop.partition("; do")[0].replace("\\\n", " ") for loop in loops)
    command = f"shopt -s failglob; printf '%s\\n' {names}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True
    )
    recipes = [load_recipe(root / path) for path in done.stdout.split()]
    assert {row.config for row in PUBLISHED} <= {recipe.name for recipe in recipes}
    trained: set[str] = set()
    for recipe in recipes:
        assert {teacher.run for teacher in recipe.all_teachers} <= trained, recipe.name
        trained.add(f"runs/{recipe.name}")
