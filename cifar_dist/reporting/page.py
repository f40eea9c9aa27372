"""Render runs as one HTML page without scripts or external resources."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from cifar_dist import __version__
from cifar_dist.data.batches import split_train_val
from cifar_dist.data.dataset import (
    DIGEST,
    load_split,
    no_data_error,
    read_hierarchy,
)
from cifar_dist.evaluation.report import class_name, compute_metrics, describe_temperature
from cifar_dist.evaluation.scores import class_scores, confusion, merge_classes
from cifar_dist.inference.stored_run import Run
from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.runs import CIFAR_100, training_data
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.reporting.charts import (
    COLORS,
    Series,
    large_heat_map,
    line_chart,
    reliability_chart,
    small_heat_map,
)
from cifar_dist.reporting.comparison import Group, group_runs, mean_std, paired_tests
from cifar_dist.reporting.images import (
    augmented_views,
    confident_mistakes,
    data_uri,
    frequent_confusions,
)
from cifar_dist.reporting.tutorial import compare_with_published
from cifar_dist.run_folder.evaluations import same_data
from cifar_dist.utils.log import log, progress_bar

CURVES = (  # kind of record, key, axis label
    ("eval", "top1", "test top-1, %"),
    ("train", "loss", "training loss"),
    ("eval", "loss", "test loss"),
    ("train", "top1", "training top-1, %"),
    ("eval", "val_top1", "val top-1, %"),
    ("train", "lr", "learning rate"),
)
HARDEST_CLASSES = 12


def curves(runs: Sequence[Run], group_of: dict[Path, int]) -> list[Any]:
    """Return a chart for each quantity that some run has recorded."""
    charts = [
        line_chart(
            [
                Series(
                    name=run.recipe.name,
                    group=group_of[run.folder],
                    points=[
                        (record["epoch"], record[key])
                        for record in run.records
                        if record["kind"] == kind and isinstance(record.get(key), int | float)
                    ],
                )
                for run in runs
            ],
            x_label="epoch",
            y_label=label,
        )
        for kind, key, label in CURVES
    ]
    return [chart for chart in charts if chart is not None]


def find_data(run: Run, data: Path | None) -> tuple[Path, str | None]:
    """Return the folder of the run's data, and what is wrong with it or None."""
    path = data or Path(run.recipe.data.path)
    if not (path / DIGEST).exists():
        return path, str(no_data_error(path))
    if not same_data(run.environment, path):
        return path, f"{path} is other data; give the folder of the run's data with --data FOLDER"
    return path, None


def headline_metrics(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the (name, value) pairs at the top of a run's details."""
    interval, without = evaluation["top1_interval"], evaluation.get("without_near_duplicates")
    metrics = [
        ("top-1", f"{evaluation['top1']:.2f} %"),
        ("95 % interval of top-1", f"{interval['low']:.2f} to {interval['high']:.2f}"),
        ("top-5", f"{evaluation['top5']:.2f} %"),
        ("superclass top-1", f"{evaluation['superclass_top1']:.2f} %"),
        ("errors inside the superclass", f"{evaluation['errors_inside_superclass']:.2f} %"),
        ("errors outside the superclass", f"{evaluation['errors_outside_superclass']:.2f} %"),
    ]
    if without and without["top1"] is not None:
        name = f"top-1 without {without['num_excluded']} near-duplicates"
        metrics.append((name, f"{without['top1']:.2f} %"))
    if evaluation.get("cifair"):
        metrics.append(("ciFAIR-100 top-1", f"{evaluation['cifair']['top1']:.2f} %"))
    return metrics


def run_details(group: Group, run: Run, data: Path) -> dict[str, Any]:
    """Return the template values for one run's predictions and images."""
    assert run.predictions is not None
    logits, labels = run.predictions
    hierarchy, test = read_hierarchy(data), load_split(data, "test")
    table = confusion(labels, logits.argmax(1), logits.shape[1])
    coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    evaluation = run.evaluation or compute_metrics(logits, labels, hierarchy)
    calibration, temperature = evaluation["calibration"], evaluation.get("temperature")
    hardest = sorted(
        (
            (scores.recall, name, scores)
            for scores, name in zip(class_scores(table), hierarchy.fine, strict=True)
            if scores.recall is not None
        ),
        key=lambda row: row[:2],
    )
    train = load_split(data, "train")
    rows = torch.arange(len(train.labels))
    if run.recipe.data.val_size:
        rows, _ = split_train_val(train.labels, run.recipe.data.val_size)
    label = f"confusion of {run.recipe.name}"
    return {
        "label": group.label,
        "folder": run.folder,
        "rows": f"{len(labels):,}",
        "other_runs": len(group.runs) - 1,
        "metrics": headline_metrics(evaluation),
        "note": ""
        if run.evaluation
        else f"For temperature and near-duplicates: python -m cifar_dist.evaluate {run.folder}",
        "coarse": small_heat_map(coarse, hierarchy.coarse, label),
        "fine": large_heat_map(table, hierarchy.coarse_of_fine.tolist(), label),
        "frequent": frequent_confusions(logits, labels, hierarchy.fine),
        "hardest": [
            {
                "name": name,
                "recall": recall,
                "precision": scores.precision,
                "most_confused_with": class_name(hierarchy.fine, scores.most_confused_with),
            }
            for recall, name, scores in hardest[:HARDEST_CLASSES]
        ],
        "reliability": reliability_chart(calibration["counts"], calibration["top1"], "reliability"),
        "ece": calibration["ece"],
        "temperature": temperature,
        "temperature_note": temperature and describe_temperature(temperature["value"]),
        "calibrated": temperature
        and temperature["value"] != 1
        and reliability_chart(
            temperature["counts"], temperature["top1"], "reliability after temperature scaling"
        ),
        "mistakes": confident_mistakes(logits, labels, test.images, hierarchy.fine),
        "views": data_uri(augmented_views(run.recipe.augment, train, rows)),
    }


def non_default_values(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return the recipe's keys that differ from the defaults."""
    defaults = flatten(to_dict(Recipe(name=recipe.name)))
    return [
        (name, value)
        for name, value in flatten(to_dict(recipe)).items()
        if defaults.get(name) != value
    ]


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """Return a notice for each group with several runs of the same seed."""
    return [
        f"{group.label}: {len(group.runs)} runs, but {len(seeds)} seed(s), so the standard deviation "
        "is too small; leave out the runs that repeat a seed."
        for group in groups
        if len(seeds := {run.recipe.run.seed for run in group.runs}) < len(group.runs)
    ]


def render_page(runs: Sequence[Run], *, title: str, data: Path | None, tutorial: bool) -> str:
    """Return the whole page as HTML; names from recipes and data are escaped."""
    groups = group_runs(runs)
    group_of = {run.folder: index for index, group in enumerate(groups) for run in group.runs}
    for run in runs:  # an unfinished run is in no group and gets its own color
        group_of.setdefault(run.folder, len(set(group_of.values())))
    legend = {group_of[run.folder]: f"{run.recipe.name} (not finished)" for run in runs}
    legend |= {index: group.label for index, group in enumerate(groups)}
    notices = repeated_seeds(groups)
    details = []
    not_cifar_100: dict[str, list[str]] = {}  # labels by what the runs were trained on
    without_data: dict[str, list[str]] = {}  # labels by reason
    bar = progress_bar(0, len(groups), enabled=True, unit="recipe")
    for group in groups:
        run = group.runs[0]
        trained_on = training_data(run.recipe, run.environment, data or Path(run.recipe.data.path))
        if trained_on != CIFAR_100:
            not_cifar_100.setdefault(trained_on, []).append(group.label)
        run_with_logits = next((run for run in group.runs if run.predictions is not None), None)
        if run_with_logits is not None:
            path, problem = find_data(run_with_logits, data)
            if problem:
                without_data.setdefault(problem, []).append(group.label)
            else:
                details.append(run_details(group, run_with_logits, path))
        bar.update()
    bar.close()
    for problem, labels in without_data.items():
        notice = f"no classes, confusions and images of {', '.join(labels)}: {problem}"
        log.warning(notice)
        notices.append(notice)
    notices += [
        f"Trained on {what}: {', '.join(labels)}." for what, labels in not_cifar_100.items()
    ]
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar_dist.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return templates.get_template("page.html").render(
        title=title,
        created=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        runs=runs,
        groups=groups,
        tests=paired_tests(groups),
        tutorial=compare_with_published(groups) if tutorial else None,
        legend=[{"color": index % COLORS, "name": name} for index, name in sorted(legend.items())],
        charts=curves(runs, group_of),
        details=details,
        notices=notices,
        mean_std=mean_std,
        non_default_values=non_default_values,
    )
