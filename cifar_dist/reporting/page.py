"""Floor 5. Runs -> one HTML page that needs no network and no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from cifar_dist import __version__
from cifar_dist.data.batches import split_train_val
from cifar_dist.data.dataset import load_split, read_digest, read_hierarchy
from cifar_dist.evaluation.report import compute_metrics, name_of
from cifar_dist.evaluation.scores import class_scores, confusion, merge_classes
from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.reporting.charts import (
    COLORS,
    Series,
    large_heat_map,
    line_chart,
    reliability_chart,
    small_heat_map,
)
from cifar_dist.reporting.comparison import (
    Group,
    Run,
    group_runs,
    mean_std,
    paired_tests,
)
from cifar_dist.reporting.images import (
    augmented_views,
    confident_mistakes,
    data_uri,
    frequent_confusions,
)
from cifar_dist.reporting.tutorial import compare_with_published
from cifar_dist.run_folder.evaluations import same_data
from cifar_dist.utils.log import progress_bar

CURVES = (  # kind of line, its value, and the axis's name
    ("eval", "top1", "test top-1, %"),
    ("train", "loss", "training loss"),
    ("eval", "loss", "test loss"),
    ("train", "top1", "training top-1, %"),
    ("eval", "val_top1", "val top-1, %"),
    ("train", "lr", "learning rate"),
)


def curves(runs: Sequence[Run], group_of: dict[Path, int]) -> list[Any]:
    """A chart for each value that some run has."""
    charts = [
        line_chart(
            [
                Series(
                    name=run.recipe.name,
                    group=group_of[run.folder],
                    points=[
                        (line["epoch"], line[value])
                        for line in run.records
                        if line["kind"] == kind and isinstance(line.get(value), int | float)
                    ],
                )
                for run in runs
            ],
            x_label="epoch",
            y_label=label,
        )
        for kind, value, label in CURVES
    ]
    return [chart for chart in charts if chart is not None]


def data_of(run: Run, asked: Path | None) -> tuple[Path | None, str]:
    """Where the run's data lie, or None and why its pictures and class names cannot be shown."""
    data = asked or Path(run.recipe.data.path)
    remedy = "give its place with --data to see classes, confusions and pictures"
    if not (data / "digest.json").exists():
        return None, f"{run.recipe.name}: {data} has no data here; {remedy}"
    if not same_data(run.environment, data):
        return None, f"{run.recipe.name}: {data} holds other data than it was trained on; {remedy}"
    return data, ""


def closer_look(group: Group, run: Run, data: Path) -> dict[str, Any]:
    """All that the page shows of one run's predictions and pictures."""
    assert run.predictions is not None
    logits, labels = run.predictions
    hierarchy, test = read_hierarchy(data), load_split(data, "test")
    table = confusion(labels, logits.argmax(1), logits.shape[1])
    found = run.evaluation or compute_metrics(logits, labels, hierarchy)
    scores = zip(class_scores(table), hierarchy.fine, strict=True)
    hardest = sorted(
        [(one.recall, name, one) for one, name in scores if one.recall is not None],
        key=lambda row: row[:2],
    )
    calibration, tempered = found["calibration"], found.get("temperature")
    interval, without = found["top1_interval"], found.get("without_near_duplicates")
    facts = [
        ("top-1", f"{found['top1']:.2f} %"),
        ("its 95 % interval", f"{interval['low']:.2f} to {interval['high']:.2f}"),
        ("top-5", f"{found['top5']:.2f} %"),
        ("superclass", f"{found['superclass_top1']:.2f} %"),
        ("errors inside the superclass", f"{found['errors_inside_superclass']:.2f} %"),
        ("errors outside it", f"{found['errors_outside_superclass']:.2f} %"),
    ]
    if without and without["top1"] is not None:
        facts.append(
            (
                f"top-1 without {without['num_excluded']} near-duplicates",
                f"{without['top1']:.2f} %",
            )
        )
    if found.get("cifair"):
        facts.append(("ciFAIR-100", f"{found['cifair']['top1']:.2f} %"))
    train = load_split(data, "train")
    rows = torch.arange(len(train.labels))
    if run.recipe.data.val_size:
        rows, _ = split_train_val(train.labels, run.recipe.data.val_size)
    views = data_uri(augmented_views(run.recipe.augment, train, rows))
    label = f"confusion of {run.recipe.name}"
    coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    return {
        "label": group.label,
        "folder": run.folder,
        "rows": f"{len(labels):,}",
        "others": len(group.runs) - 1,
        "facts": [{"name": name, "value": value} for name, value in facts],
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
                "precision": one.precision,
                "most_confused_with": name_of(hierarchy.fine, one.most_confused_with),
            }
            for recall, name, one in hardest[:12]
        ],
        "reliability": reliability_chart(calibration["counts"], calibration["top1"], "reliability"),
        "ece": calibration["ece"],
        "temperature": tempered["value"] if tempered else None,
        "tempered": tempered
        and reliability_chart(tempered["counts"], tempered["top1"], "reliability, tempered"),
        "tempered_ece": tempered["ece"] if tempered else None,
        "mistakes": confident_mistakes(logits, labels, test.images, hierarchy.fine),
        "views": views,
    }


def changed(recipe: Recipe) -> list[tuple[str, Any]]:
    """What a recipe says beside the defaults."""
    defaults = flatten(to_dict(Recipe(name=recipe.name)))
    return [
        (name, value)
        for name, value in flatten(to_dict(recipe)).items()
        if defaults.get(name) != value
    ]


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """A sentence for each group in which a seed counts more than once."""
    return [
        f"{group.label}: {len(group.runs)} runs, but {len(seeds)} seed(s), so its deviation is too "
        "small; leave out the runs that repeat a seed."
        for group in groups
        if len(seeds := {run.recipe.run.seed for run in group.runs}) < len(group.runs)
    ]


def page(runs: Sequence[Run], *, title: str, data: Path | None, tutorial: bool) -> str:
    """The whole page; all names in it are escaped."""
    groups = group_runs(runs)
    group_of = {run.folder: place for place, group in enumerate(groups) for run in group.runs}
    for run in runs:  # those that have not finished have a colour of their own
        group_of.setdefault(run.folder, len(set(group_of.values())))
    legend = {group_of[run.folder]: f"{run.recipe.name} (not finished)" for run in runs}
    legend |= {place: group.label for place, group in enumerate(groups)}
    notices = repeated_seeds(groups)
    closer, drawn = [], []
    bar = progress_bar(0, len(groups), shown=True, unit="recipe")
    for group in groups:
        for shown in [run for run in group.runs if run.predictions is not None][:1]:
            where, problem = data_of(shown, data)
            if where is None:
                notices.append(problem)
                continue
            if read_digest(where)["content"] == "sample":
                drawn.append(group.label)
            closer.append(closer_look(group, shown, where))
        bar.update()
    bar.close()
    if drawn:
        notices.append(f"Trained on the drawn sample, not on CIFAR-100: {', '.join(drawn)}.")
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar_dist.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return templates.get_template("page.html").render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        runs=runs,
        groups=groups,
        tests=paired_tests(groups),
        tutorial=compare_with_published(groups) if tutorial else None,
        legend=[{"colour": place % COLORS, "name": name} for place, name in sorted(legend.items())],
        charts=curves(runs, group_of),
        closer=closer,
        notices=notices,
        spread=mean_std,
        changed=changed,
    )
