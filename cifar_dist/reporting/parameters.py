"""Chart the results of many runs over the recipe keys in which they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cifar_dist.inference.stored_run import Run
from cifar_dist.recipe.diff import seed_free_config
from cifar_dist.reporting.charts import Dot, scatter_chart

MIN_RECIPES = 6
MAX_KEYS = 9


def parameter_charts(runs: Sequence[tuple[Run, str]]) -> list[Markup]:
    """Return a chart for each key that differs, given a run of each recipe with its color.

    Return nothing for fewer than MIN_RECIPES. The result is top-1 of the last evaluation, on validation rows if all runs have them.
    """
    results = [(run, color, last_evaluation(run)) for run, color in runs]
    results = [result for result in results if "top1" in result[2]]
    if len(results) < MIN_RECIPES:
        return []
    metric = "val_top1" if all("val_top1" in last for _, _, last in results) else "top1"
    label = "validation top-1, %" if metric == "val_top1" else "test top-1, %"
    configs = [seed_free_config(run.recipe) for run, _, _ in results]
    charts = []
    for key in varying_keys(configs)[:MAX_KEYS]:
        values = [config.get(key) for config in configs]
        positions = [
            float(value)
            for value in values
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        names: list[str] = []
        if len(positions) < len(values):
            names = sorted({json.dumps(value) for value in values})
            positions = [float(names.index(json.dumps(value))) for value in values]
        dots = [
            Dot(
                x=position,
                y=last[metric],
                tip=f"{run.recipe.name}: {last[metric]:.2f} % at epoch {last['epoch']:g}, {key} = {value}",
                style=color,
                is_finished=run.is_finished,
            )
            for (run, color, last), value, position in zip(results, values, positions, strict=True)
        ]
        charts.append(scatter_chart(dots, x_label=key, y_label=label, names=names))
    return charts


def last_evaluation(run: Run) -> dict[str, Any]:
    evaluations = (record for record in reversed(run.records) if record["kind"] == "eval")
    return next(evaluations, {})


def varying_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys that do not have the same value in all flat configs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
