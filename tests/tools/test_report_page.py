"""Tests of the parts of the report page: intervals, plots, details and the commands of a run."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

from cifar_dist.data.dataset import Hierarchy
from cifar_dist.evaluation.scores import bootstrap_interval
from cifar_dist.inference.stored_run import Run, read_run
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.reporting.charts import WIDE, Series, line_chart, reliability_chart
from cifar_dist.reporting.comparison import STUDENT_T, Group
from cifar_dist.reporting.details import superclass_map
from cifar_dist.reporting.dot_plot import dot_plot
from cifar_dist.reporting.entries import Entry, series
from cifar_dist.reporting.images import confused_pairs
from cifar_dist.reporting.page import render_page
from cifar_dist.reporting.parameters import parameter_charts
from cifar_dist.reporting.reproduce import reproduce

ROOT = Path(__file__).parents[2]
PAGE_CSS = ROOT / "cifar_dist/reporting/page.css"
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml"))


def stored_run(
    top1: float = 50.0, *, records: list[dict[str, Any]] | None = None, **changes: Any
) -> Run:
    """Return a finished run in memory with two classes, of which `top1` percent are correct."""
    labels = torch.arange(1000) % 2
    predicted = torch.where(torch.arange(1000) < 10 * top1, labels, 1 - labels)
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    values: dict[str, Any] = {
        "folder": Path("runs/x"),
        "recipe": Recipe(name="x"),
        "summary": {"finished": True, "top1": top1, "epochs": 2, "device_seconds": 60.0},
        "records": records or [],
        "environment": {"data": "0" * 64, "device": "cpu", "hardware": "a CPU"},
        "evaluation": None,
        "predictions": (logits, labels),
    }
    return Run(**(values | changes))


def entry(*runs: Run, index: int = 0, is_finished: bool = True) -> Entry:
    group = Group(label="x", runs=runs, config_diff=()) if is_finished else None
    return Entry(label="x", index=index, runs=runs, group=group)


def evaluations(*top1: float) -> list[dict[str, Any]]:
    return [
        {"kind": "eval", "step": 10 * epoch, "epoch": float(epoch), "top1": value}
        for epoch, value in enumerate(top1, 1)
    ]


# ----------------------------------------------------------------------------- intervals


def test_quantiles_are_those_of_students_t() -> None:
    expected = [scipy.stats.t.ppf(0.975, freedom) for freedom in range(1, len(STUDENT_T) + 1)]
    assert pytest.approx(expected, abs=5e-4) == STUDENT_T


def test_interval_of_three_seeds_is_students_of_fewer_that_of_the_test_images() -> None:
    values = (50.0, 51.0, 53.0)
    interval = Group(label="x", runs=tuple(map(stored_run, values)), config_diff=()).top1_interval
    assert interval is not None
    expected = scipy.stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=2e-3)
    assert interval.over == "seeds"
    for values_of_two in ((50.0,), (50.0, 51.0)):
        runs = tuple(map(stored_run, values_of_two))
        interval = Group(label="x", runs=runs, config_diff=()).top1_interval
        assert interval is not None
        assert interval.over == "test images"
        lows = [100 * bootstrap_interval(run.correct)[0] for run in runs if run.correct is not None]
        assert interval.low == pytest.approx(sum(lows) / len(lows))
    without = stored_run(predictions=None)
    assert Group(label="x", runs=(without,), config_diff=()).top1_interval is None


# ----------------------------------------------------------------------------- plots


def test_curve_of_seeds_is_their_mean_with_a_band_where_all_have_values() -> None:
    first, second = (
        stored_run(records=evaluations(*values)) for values in ((10, 20, 30), (14, 22))
    )
    line = series(entry(first, second), "eval", "top1")
    assert line.points == [(1, 12), (2, 21)]
    assert line.band == [(10, 14), (20, 22)]
    assert series(entry(first), "eval", "top1").band == ()


def test_epochs_on_the_axis_are_whole_and_labels_at_the_ends_do_not_overlap() -> None:
    lines = [
        Series(name=f"recipe {index}", group=index, points=[(1, 10), (2, 50 + index / 100)])
        for index in range(6)
    ]
    chart = line_chart(lines, x_label="epoch", y_label="top-1", frame=WIDE)
    assert chart is not None
    ticks = re.findall(r'class="tick mid"[^>]*>([^<]+)<', chart)
    assert ticks == ["1", "2"]
    labels = re.findall(r'<text class="name c(\d)" x="[\d.]+" y="([\d.]+)">', chart)
    heights = sorted(float(y) for _, y in labels)
    assert len(heights) == 6
    assert all(b - a >= 15.9 for a, b in pairwise(heights))
    order = [int(group) for group, _ in sorted(labels, key=lambda label: float(label[1]))]
    assert order == [5, 4, 3, 2, 1, 0]  # as the lines end, the highest first
    assert chart.count("<circle") == 12  # few points are marked
    long = Series(name="y" * 99, group=0, points=[(x, x) for x in range(200)])
    chart = line_chart([long], x_label="epoch", y_label="top-1", frame=WIDE)
    assert chart is not None
    assert 'class="dot tip' in chart
    assert "y" * 40 not in re.sub(r"<title>.*?</title>", "", chart)


def test_results_are_sorted_and_one_recipe_is_compared_with_those_of_others() -> None:
    references = (("others", 60.0),)
    plot = dot_plot([entry(stored_run(40)), entry(stored_run(50), index=1)], references)
    assert plot is not None
    assert [row.text for row in plot.rows] == ["50.00 %", "40.00 %"]
    assert plot.rows[0].mean > plot.rows[1].mean
    assert plot.rows[0].span is not None
    low, high = plot.rows[0].span
    assert low < plot.rows[0].mean < high
    plot = dot_plot([entry(stored_run(40))], references)
    assert plot is not None
    assert [row.name for row in plot.rows] == ["others", "x"]
    assert dot_plot([entry(stored_run(40))], ()) is None
    assert dot_plot([entry(stored_run(40), is_finished=False)], references) is None


def test_unfinished_run_is_drawn_and_named() -> None:
    run = stored_run(
        summary={}, records=evaluations(10, 20), predictions=None, recipe=Recipe(name="half")
    )
    text = render_page([run, stored_run(recipe=Recipe(name="whole"))])
    assert "not finished: epoch 2.0 of 200; top-1 of the last evaluation" in text
    assert "half (not finished)" in text
    assert "dash2" in text
    text = render_page([run], refresh_seconds=20)
    assert '<meta http-equiv="refresh" content="20">' in text
    assert "Reproduce" not in text


# ----------------------------------------------------------------------------- details


def test_confusions_are_counted_and_shown_with_images() -> None:
    """0 -> 1 three times, 2 -> 0 once; class 1 is always right."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([1, 1, 1, 0, 1, 1, 0])
    logits = torch.nn.functional.one_hot(predicted, 3).double() * 4
    logits[1] *= 2  # the most confident of the three
    images = torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8)
    pairs = confused_pairs(
        logits,
        labels,
        images,
        ("a", "b", "c"),
        torch.tensor([0, 0, 1]),
        count=5,
        examples=2,
    )
    found = [(pair.truth, pair.predicted, pair.count, pair.of) for pair in pairs]
    assert found == [("a", "b", 3, 4), ("c", "a", 1, 1)]
    assert [pair.same_superclass for pair in pairs] == [True, False]
    assert [len(pair.images) for pair in pairs] == [2, 1]


def test_superclass_map_has_one_scale_for_all_models() -> None:
    hierarchy = Hierarchy(
        fine=("a", "b"), coarse=("big_cats", "trees"), coarse_of_fine=torch.tensor([0, 1])
    )
    labels = torch.tensor([0] * 10 + [1] * 10)
    predicted = torch.tensor([0] * 7 + [1] * 3 + [1] * 10)
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    (first, row), (second, _) = superclass_map(logits, labels, hierarchy)
    assert (first, second) == ("big cats", "trees")
    assert [cell.share for cell in row] == pytest.approx([70, 30])
    assert [cell.opacity for cell in row] == pytest.approx([0.7, 1.0])
    assert [cell.is_correct for cell in row] == [True, False]


def test_reliability_is_one_chart_with_a_histogram() -> None:
    chart = reliability_chart(
        [("as trained", [None, 40.0, 80.0]), ("after", [10.0, 50.0, 90.0])],
        [0, 5, 10],
        "reliability",
    )
    assert chart.count('<rect class="bar"') == 3
    assert "5 images" in chart
    assert chart.count("<circle") == 5
    assert "as trained" in chart
    assert "after" in chart


# ----------------------------------------------------------------------------- commands


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_commands_contain_the_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    script = reproduce(stored_run(recipe=recipe)).splitlines()
    assert script[-1] == f"cifar-dist train {recipe.name}.yaml"
    subprocess.run(["bash", "-ec", "\n".join(script[:-1])], cwd=tmp_path, check=True)
    assert load_recipe(tmp_path / f"{recipe.name}.yaml") == recipe


def test_commands_of_a_run_cannot_be_injected(tmp_path: Path) -> None:
    hostile = "x\ntouch harmed"
    run = stored_run(
        environment={
            "hardware": hostile,
            "commit": f"$(touch harmed){hostile}+",
            "data": hostile,
            "packages": {"torch": hostile},
            "origin": {"run": f"runs/a; {hostile}"},
        },
        recipe=dataclasses.replace(
            Recipe(name="x"),
            data=dataclasses.replace(Recipe(name="x").data, path="a\nEND\ntouch harmed"),
        ),
        summary={"world_size": 2},
    )
    script = reproduce(run)
    programs = 'git() { :; }; function cifar-dist() { printf "%s\\n" "$@" > called; };'
    subprocess.run(["bash", "-c", f"{programs}\n{script}"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["called", "x.yaml"]
    called = (tmp_path / "called").read_text()
    assert called == f"train\nx.yaml\n--fork\nruns/a; {hostile}\n--processes\n2\n"


def test_commands_of_a_trained_run(run: Path) -> None:
    script = reproduce(read_run(run))
    assert re.search(r"^# data: SHA-256 [0-9a-f]{64}$", script, re.MULTILINE)
    assert re.search(r"^(git checkout [0-9a-f]{7,}|# unknown commit)", script, re.MULTILINE)
    assert "torch==" in script


# ----------------------------------------------------------------------------- colors


def luminance(color: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme: str) -> None:
    light, dark = PAGE_CSS.read_text().split("@media (prefers-color-scheme: dark)")
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if theme == "light" else dark))
    texts = ["text", "muted", "wrong", "right", "accent", *(f"c{index}" for index in range(8))]
    for name in texts:
        for background in ("background", "card"):
            assert contrast(colors[name], colors[background]) >= 4.5, (name, background)
    assert contrast(colors["text"], colors["chip"]) >= 4.5
    assert contrast(colors["bar"], colors["card"]) >= 3


# ----------------------------------------------------------------------------- parameters


def test_results_are_drawn_over_each_key_in_which_the_recipes_differ() -> None:
    runs = []
    for index, lr in enumerate((0.001, 0.01, 0.1, 0.3, 0.5, 1.0)):
        optim = dataclasses.replace(Recipe(name="x").optim, lr=lr, name="sgd" if index else "adamw")
        recipe = dataclasses.replace(Recipe(name=f"trial_{index}"), optim=optim)
        records = [record | {"val_top1": 10.0 * index} for record in evaluations(1, 2)]
        summary = {"finished": True, "top1": 1.0} if index else {}
        runs.append((stored_run(recipe=recipe, records=records, summary=summary), "c0"))
    assert parameter_charts(runs[:5]) == []
    charts = {
        re.findall(r'class="label mid"[^>]*>([^<]+)<', chart)[0]: chart
        for chart in parameter_charts(runs)
    }
    assert set(charts) == {"optim.lr", "optim.name"}
    chart = charts["optim.lr"]
    assert "validation top-1" in chart
    assert (chart.count('"dot c0"'), chart.count('"ring c0"')) == (5, 1)
    assert ">0.001<" in chart  # a logarithmic axis
    assert ">0.01<" in chart
    assert "trial_3: 30.00 % at epoch 2, optim.lr = 0.3" in chart
    assert "&#34;adamw&#34;" in charts["optim.name"]
