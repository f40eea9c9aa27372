"""Compare runs: groups of seeds, means, paired tests and a LaTeX table."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cifar_dist.evaluation.scores import bootstrap_interval, holm, mcnemar
from cifar_dist.inference.stored_run import Run
from cifar_dist.recipe.diff import seed_free_config
from cifar_dist.recipe.runs import training_data
from cifar_dist.recipe.schema import Recipe
from cifar_dist.tracking.tracker import name_without_seed
from cifar_dist.training.fork import describe_fork

# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
NORMAL = 1.960
MINUTES_BELOW_SECONDS = 2 * 3600
SIGNIFICANCE_LEVEL = 0.05
MIN_SEEDS = 3  # for an interval over the seeds: that of two would be 18 standard deviations wide


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval of top-1 in percent."""

    low: float
    high: float
    over: str  # what varies: "seeds" or "test images"


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Finished runs that differ only in their seeds: same recipe, micro-batches, data and teachers."""

    label: str
    runs: tuple[Run, ...]
    config_diff: tuple[str, ...]  # from the first group: "optim.lr: 0.3 → 0.1"

    def values(self, name: str) -> list[float]:
        return [run.summary[name] for run in self.runs if run.summary.get(name) is not None]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def std(self, name: str) -> float | None:
        """Return the sample standard deviation; None for fewer than two runs."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def top1_interval(self) -> Interval | None:
        """The interval of the mean over the seeds (Student's t).

        For fewer than MIN_SEEDS runs it is that of the test images (bootstrap), averaged over the runs;
        None without predictions.
        """
        mean, std, n = self.mean("top1"), self.std("top1"), len(self.values("top1"))
        if mean is not None and std is not None and n >= MIN_SEEDS:
            quantile = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else NORMAL
            half = quantile * std / math.sqrt(n)
            return Interval(low=mean - half, high=mean + half, over="seeds")
        ends = [bootstrap_interval(run.correct) for run in self.runs if run.correct is not None]
        if not ends:
            return None
        low, high = (100 * statistics.fmean(values) for values in zip(*ends, strict=True))
        return Interval(low=low, high=high, over="test images")

    @property
    def device_hours(self) -> float:
        return sum(run.device_hours for run in self.runs)

    @property
    def time_per_run(self) -> str:
        """Wall-clock time, the mean over the runs, like `3.8 min`."""
        seconds = self.mean("seconds") or 0.0
        if seconds < MINUTES_BELOW_SECONDS:
            return f"{seconds / 60:.1f} min"
        return f"{seconds / 3600:.1f} h"

    @property
    def devices(self) -> str:
        """The unit of `device_hours`: GPU or CPU process."""
        kinds = {str(run.environment.get("device", "?")) for run in self.runs}
        return "/".join(
            sorted("GPU" if kind == "cuda" else f"{kind.upper()} process" for kind in kinds)
        )

    @property
    def hardware(self) -> str:
        return ", ".join(
            sorted({str(run.environment.get("hardware", "unknown")) for run in self.runs})
        )


def experiment_key(
    recipe: Recipe,
    micro_batches: int | None,
    data: str | None,
    *,
    teachers: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
) -> str:
    """Return what is equal in runs that differ only in their seeds.

    `data` and `teachers` are digests, `origin` that of a fork, which is never equal to a run from
    scratch.
    """
    forked = [origin["experiment"], origin["start_step"]] if origin else None
    key = [seed_free_config(recipe), micro_batches, data, list(teachers), forked]
    return json.dumps(key, sort_keys=True)


def key_of(run: Run) -> str:
    return experiment_key(
        run.recipe,
        run.summary.get("micro_batches"),
        run.environment.get("data"),
        teachers=run.environment.get("teachers", ()),
        origin=run.origin,
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group the finished runs by recipe, micro-batches, data and teachers, in the order of first runs.

    Labels say on which data a group was trained, unless it is the same for all.
    """
    finished = [run for run in runs if run.is_finished]
    same_data = (
        len({(run.environment.get("data"), run.recipe.data.labels) for run in finished}) <= 1
    )
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_finished:
            by_config.setdefault(key_of(run), []).append(run)
    groups: list[Group] = []
    labels: dict[str, int] = {}
    for members in by_config.values():
        members.sort(key=lambda run: run.recipe.run.seed)
        label = members[0].recipe.name
        if len(members) > 1:
            label = name_without_seed(label, members[0].recipe.run.seed)
        if origin := members[0].origin:
            label += f" ({describe_fork(origin)})"
        if not same_data:
            environment, path = members[0].environment, Path(members[0].recipe.data.path)
            label += f" on {training_data(members[0].recipe, environment, path)}"
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:
            label = f"{label} #{labels[label]}"
        config_diff = differences(groups[0].runs[0], members[0]) if groups else ()
        groups.append(Group(label=label, runs=tuple(members), config_diff=config_diff))
    return groups


def differences(first: Run, other: Run) -> tuple[str, ...]:
    """Return how the recipe of `other` differs from the first: `optim.lr: 0.3 → 0.1`."""
    before, after = (
        seed_free_config(run.recipe)
        | {
            "micro_batches": run.summary.get("micro_batches"),
            "data": str(run.environment.get("data"))[:12],
            "teachers' weights": [str(one)[:12] for one in run.environment.get("teachers", ())],
            "start": describe_fork(run.origin) if run.origin else "from scratch",
        }
        for run in (first, other)
    )

    def text(values: Mapping[str, Any], name: str) -> str:
        value = values.get(name, "absent")
        return value if isinstance(value, str) else json.dumps(value)

    return tuple(
        f"{name}: {text(before, name)} → {text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    first: str
    second: str
    seed: int
    difference: float  # second's top-1 minus first's, in percentage points
    only_first: int
    only_second: int
    p: float
    adjusted_p: float  # for all tests of the page


def paired_tests(groups: Sequence[Group]) -> list[PairedTest]:
    """Return McNemar's exact test of each pair of groups, once per common seed, Holm-adjusted.

    Groups without a common seed are compared by their first runs. Runs with other data or test labels
    are not compared.
    """
    tests: list[PairedTest] = []
    for first, second in itertools.combinations(groups, 2):
        by_seed = [{run.recipe.run.seed: run for run in group.runs} for group in (first, second)]
        common = sorted(by_seed[0].keys() & by_seed[1].keys())
        pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in common]
        for run, other in pairs or [(first.runs[0], second.runs[0])]:
            if run.predictions is None or other.predictions is None:
                continue
            if run.environment.get("data") != other.environment.get("data") or not torch.equal(
                run.predictions[1], other.predictions[1]
            ):
                continue
            assert run.correct is not None
            assert other.correct is not None
            test = mcnemar(run.correct, other.correct)
            tests.append(
                PairedTest(
                    first=first.label,
                    second=second.label,
                    seed=run.recipe.run.seed,
                    difference=100 * (test.only_second - test.only_first) / len(run.correct),
                    only_first=test.only_first,
                    only_second=test.only_second,
                    p=test.p,
                    adjusted_p=1.0,
                )
            )
    adjusted = holm([test.p for test in tests])
    return [replace(test, adjusted_p=p) for test, p in zip(tests, adjusted, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """The paired tests of two groups, one per common seed."""

    first: str
    second: str
    tests: tuple[PairedTest, ...]

    @property
    def difference(self) -> float:
        """Mean of the second's top-1 minus the first's, in percentage points."""
        return statistics.fmean(test.difference for test in self.tests)

    @property
    def num_significant(self) -> int:
        return sum(test.adjusted_p < SIGNIFICANCE_LEVEL for test in self.tests)


def summarize_pairs(tests: Sequence[PairedTest]) -> list[PairSummary]:
    """Return the tests of each pair of groups together, in their order."""
    by_pair: dict[tuple[str, str], list[PairedTest]] = {}
    for test in tests:
        by_pair.setdefault((test.first, test.second), []).append(test)
    return [
        PairSummary(first=first, second=second, tests=tuple(members))
        for (first, second), members in by_pair.items()
    ]


# ----------------------------------------------------------------------------- LaTeX

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{special: f"\\{special}" for special in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def mean_std(group: Group, name: str, digits: int = 2) -> str | None:
    """Return `78.12 ± 0.20`, only the mean for a single run, or None without values."""
    mean, std = group.mean(name), group.std(name)
    if mean is None:
        return None
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def latex_table(groups: Sequence[Group]) -> str:
    """Return the comparison as a booktabs table."""
    rows = [
        " & ".join(
            [
                latex_text(group.label),
                str(len(group.runs)),
                *(
                    (mean_std(group, name) or "--").replace("±", r"$\pm$")
                    for name in ("top1", "top5")
                ),
                f"{(group.mean('parameters') or 0) / 1e6:.2f}",
                f"{group.device_hours:.2f}",
            ]
        )
        for group in groups
    ]
    body = " \\\\\n".join(rows)
    return (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{tabular}{lrrrrr}\n\\toprule\n"
        "recipe & $n$ & top-1, \\% & top-5, \\% & parameters, M & device hours \\\\\n\\midrule\n"
        f"{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"
    )
