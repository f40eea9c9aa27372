"""Compare runs: groups of seeds, means, paired tests and a LaTeX table."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cifar_dist.evaluation.scores import holm, mcnemar
from cifar_dist.inference.stored_run import Run
from cifar_dist.recipe.diff import seed_free_config
from cifar_dist.recipe.runs import training_data
from cifar_dist.recipe.schema import Recipe
from cifar_dist.tracking.tracker import name_without_seed
from cifar_dist.training.fork import describe_fork


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
    def device_hours(self) -> float:
        return sum(run.device_hours for run in self.runs)

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
    same_data = len({run.environment.get("data") for run in runs if run.is_finished}) <= 1
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
    return tuple(
        f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}"
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

    Groups without a common seed are compared by their first runs. Runs with different test labels
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
            if not torch.equal(run.predictions[1], other.predictions[1]):
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
