"""Render runs as one HTML page without scripts or external resources."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from cifar_dist import __version__
from cifar_dist.data.dataset import DIGEST, no_data_error
from cifar_dist.data.ingest.archive import CIFAR_100
from cifar_dist.inference.stored_run import Run
from cifar_dist.reporting.charts import LOW, SMALL, Frame
from cifar_dist.reporting.comparison import (
    Group,
    Interval,
    mean_std,
    paired_tests,
    summarize_pairs,
)
from cifar_dist.reporting.details import Details, run_details
from cifar_dist.reporting.dot_plot import dot_plot
from cifar_dist.reporting.entries import (
    Entry,
    curve_charts,
    curve_notes,
    facts,
    list_entries,
    top1_charts,
)
from cifar_dist.reporting.parameters import parameter_charts
from cifar_dist.reporting.reproduce import reproduce
from cifar_dist.reporting.tutorial import compare_with_published
from cifar_dist.run_folder.evaluations import same_data
from cifar_dist.utils.log import log, progress_bar

WIDE_CARD = Frame(width=860, height=300)
MAX_CARDS = 6  # with more recipes, the plot of all results replaces the cards
REFERENCES = (  # top-1 on CIFAR-100 that others report
    ("ResNet-18, 200 epochs, best test epoch (DocsaidLab/cifar100-training-demo)", 44.26),
    ("ResNet-18 with 3x3 stem, 200 epochs (Westlake-AI/openmixup)", 76.42),
)


def describe_interval(interval: Interval) -> str:
    """Return like `95 % interval 43.30 to 45.22 over the seeds`."""
    text = f"95 % interval {interval.low:.2f} to {interval.high:.2f} over the {interval.over}"
    return text if interval.over == "seeds" else f"{text}, without the influence of the seed"


def find_data(run: Run, data: Path | None) -> tuple[Path, str | None]:
    """Return the folder of the run's data, and what is wrong with it or None."""
    path = data or Path(run.recipe.data.path)
    if not (path / DIGEST).exists():
        return path, str(no_data_error(path))
    if not same_data(run.environment, path):
        return path, f"{path} is other data; give the folder of the run's data with --data FOLDER"
    return path, None


def all_details(
    entries: Sequence[Entry], data: Path | None
) -> tuple[list[tuple[Entry, Details]], list[str]]:
    """Return the details of each recipe's first run with predictions, and what could not be read."""
    details: list[tuple[Entry, Details]] = []
    without_data: dict[str, list[str]] = {}  # labels by reason
    bar = progress_bar(0, len(entries), enabled=True, unit="recipe")
    for entry in entries:
        run = next((run for run in entry.runs if run.predictions is not None), None)
        if entry.group and run is not None:
            path, problem = find_data(run, data)
            if problem:
                without_data.setdefault(problem, []).append(entry.label)
            else:
                details.append((entry, run_details(run, path)))
        bar.update()
    bar.close()
    return details, [
        f"no classes, confusions and images of {', '.join(labels)}: {problem}"
        for problem, labels in without_data.items()
    ]


def not_cifar_100(entries: Sequence[Entry], facts_of: Sequence[dict[str, str]]) -> list[str]:
    """Return a notice for each other data set that some entries were trained on."""
    labels: dict[str, list[str]] = {}
    for entry, one in zip(entries, facts_of, strict=True):
        labels.setdefault(one["data"], []).append(entry.label)
    return [
        f"Trained on {data}" + (f": {', '.join(names)}." if len(labels) > 1 else ".")
        for data, names in labels.items()
        if data != CIFAR_100.name
    ]


def default_title(entries: Sequence[Entry], data: str | None) -> str:
    """Return the name of the only recipe, or like `3 recipes on CIFAR-100`."""
    if len(entries) == 1:
        return entries[0].label
    return f"{len(entries)} recipes" + (f" on {data}" if data else "")


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """Return a notice for each group with several runs of the same seed."""
    return [
        f"{group.label}: {len(group.runs)} runs, but {len(seeds)} seed(s), so the standard deviation "
        "is too small; leave out the runs that repeat a seed."
        for group in groups
        if len(seeds := {run.recipe.run.seed for run in group.runs}) < len(group.runs)
    ]


def render_page(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    data: Path | None = None,
    tutorial: bool = False,
    refresh_seconds: int | None = None,
) -> str:
    """Return the whole page as HTML; names from recipes and data are escaped.

    With `refresh_seconds`, the page is a short one that browsers reload: results and curves.
    """
    entries = list_entries(runs)
    groups = [entry.group for entry in entries if entry.group]
    details: list[tuple[Entry, Details]] = []
    notices = repeated_seeds(groups)
    if refresh_seconds is None:
        details, problems = all_details(entries, data)
        for problem in problems:
            log.warning(problem)
        notices += problems
    facts_of = [facts(entry, data) for entry in entries]
    shared = {
        name: value
        for name, value in facts_of[0].items()
        if all(one.get(name) == value for one in facts_of)
    }
    on_cifar_100 = shared.get("data") == CIFAR_100.name
    notices += not_cifar_100(entries, facts_of)
    plot = dot_plot(entries, REFERENCES if on_cifar_100 else ())
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar_dist.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context: dict[str, Any] = {
        "title": title or default_title(entries, shared.get("data")),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "refresh_seconds": refresh_seconds,
        "runs": runs,
        "entries": entries,
        "cards": entries if len(entries) <= MAX_CARDS else [],
        "shared": shared,
        "own_facts": [
            [value for name, value in one.items() if name not in shared] for one in facts_of
        ],
        "plot": plot,
        "pairs": summarize_pairs(paired_tests(groups)),
        "tutorial": compare_with_published(groups) if tutorial else None,
        "top1_charts": top1_charts(entries),
        "charts": curve_charts(entries),
        "parameters": parameter_charts([(entry.runs[0], entry.color) for entry in entries]),
        "curve_notes": curve_notes(entries),
        "details": details,
        "notices": notices,
        "mean_std": mean_std,
        "describe_interval": describe_interval,
        "reproduce": reproduce,
        "not_finished": sum(entry.group is None for entry in entries),
        "LOW": LOW,
        "SMALL": SMALL,
        "WIDE_CARD": WIDE_CARD,
    }
    return templates.get_template("page.html").render(context)
