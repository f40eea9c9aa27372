"""Floor 5. Run folders -> what stands side by side: groups of seeds, means, paired tests, a LaTeX table."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cifar_dist.evaluation.scores import holm, mcnemar
from cifar_dist.recipe.diff import seed_free_config
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder import results
from cifar_dist.run_folder.evaluations import read_matching_evaluation
from cifar_dist.run_folder.records import MetricsFile, Record
from cifar_dist.tracking.tracker import SEED_IN_NAME
from cifar_dist.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a run folder says of itself."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    records: list[Record]
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    predictions: tuple[Tensor, Tensor] | None  # logits f32 [N, C], labels int64 [N]

    @property
    def is_finished(self) -> bool:
        return bool(self.summary.get("finished")) and "top1" in self.summary

    @property
    def device_hours(self) -> float:
        """Seconds of training, restarts included, times the number of processes."""
        return self.summary.get("seconds", 0.0) * self.summary.get("world_size", 1) / 3600

    @property
    def correct(self) -> Tensor | None:
        """bool [N]: which test pictures it has right."""
        if self.predictions is None:
            return None
        logits, labels = self.predictions
        return logits.argmax(1) == labels


def read_run(folder: Path) -> Run:
    """A run folder, finished or not; UserError for any other."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(
            f"{folder} is no run folder (no recipe.yaml in it); give one, like runs/debug"
        )
    summary = results.read_facts(folder, "summary.json")
    last = results.last_checkpoint(summary)
    return Run(
        folder=folder,
        recipe=load_recipe(folder / "recipe.yaml"),
        summary=summary,
        records=MetricsFile(folder / "metrics.jsonl").read(),
        environment=results.read_facts(folder, "environment.json"),
        evaluation=read_matching_evaluation(folder, last) if summary.get("finished") else None,
        predictions=read_logits(folder / "predictions.safetensors"),
    )


def read_logits(path: Path) -> tuple[Tensor, Tensor] | None:
    """Stored logits f32 [N, C] and labels int64 [N]; None where there is no such file."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        logits, labels = tensors["logits"], tensors["labels"]
        if logits.ndim != 2 or labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
            raise ValueError("these are no logits [N, C] and labels [N]")
        if not logits.isfinite().all():
            raise ValueError("some are not finite")
        return logits, labels
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); `python -m cifar_dist.evaluate RUN` writes it anew for a "
            "finished run"
        ) from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Finished runs of one recipe, one number of micro-batches and one data set: they differ in seeds."""

    label: str
    runs: tuple[Run, ...]
    config_diff: tuple[str, ...]  # from the first group: "optim.lr: 0.3 → 0.1"

    def values(self, name: str) -> list[float]:
        return [run.summary[name] for run in self.runs if run.summary.get(name) is not None]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def std(self, name: str) -> float | None:
        """The sample's standard deviation; None for fewer than two runs."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def device_hours(self) -> float:
        return sum(run.device_hours for run in self.runs)

    @property
    def devices(self) -> str:
        """What the hours are hours of: GPU or CPU processes."""
        kinds = {str(run.environment.get("device", "?")) for run in self.runs}
        return "/".join(
            sorted("GPU" if kind == "cuda" else f"{kind.upper()} process" for kind in kinds)
        )

    @property
    def hardware(self) -> str:
        named = sorted({str(run.environment.get("hardware", "unknown")) for run in self.runs})
        return ", ".join(named)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The finished runs by recipe (identity), micro-batches and data, in the order of their first runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_finished:
            belongs = [
                seed_free_config(run.recipe),
                run.summary.get("micro_batches"),
                run.environment.get("data"),
            ]
            found.setdefault(json.dumps(belongs, sort_keys=True), []).append(run)
    groups: list[Group] = []
    labels: dict[str, int] = {}
    for members in found.values():
        members.sort(key=lambda run: run.recipe.run.seed)
        label = (
            SEED_IN_NAME.sub("", members[0].recipe.name)
            if len(members) > 1
            else members[0].recipe.name
        )
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:
            label = f"{label} #{labels[label]}"
        differs = differences(groups[0].runs[0], members[0]) if groups else ()
        groups.append(Group(label=label, runs=tuple(members), config_diff=differs))
    return groups


def differences(first: Run, other: Run) -> tuple[str, ...]:
    """How another run's recipe differs from the first's: `optim.lr: 0.3 → 0.1`."""
    before, after = seed_free_config(first.recipe), seed_free_config(other.recipe)
    before["micro_batches"], after["micro_batches"] = (
        first.summary.get("micro_batches"),
        other.summary.get("micro_batches"),
    )
    before["data"], after["data"] = (str(r.environment.get("data"))[:12] for r in (first, other))
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
    difference: float  # second's top-1 minus first's, in points
    only_first: int
    only_second: int
    p: float
    adjusted_p: float  # for all tests of the page


def paired_tests(groups: Sequence[Group]) -> list[PairedTest]:
    """McNemar's exact test for each two groups, once for each seed that both have; Holm over all.

    Groups without a common seed meet by their first runs. Only runs on the same labels are compared.
    """
    tests: list[PairedTest] = []
    for first, second in itertools.combinations(groups, 2):
        by_seed = [{run.recipe.run.seed: run for run in group.runs} for group in (first, second)]
        common = sorted(by_seed[0].keys() & by_seed[1].keys())
        pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in common]
        for one, other in pairs or [(first.runs[0], second.runs[0])]:
            if one.predictions is None or other.predictions is None:
                continue
            if not torch.equal(one.predictions[1], other.predictions[1]):
                continue
            assert one.correct is not None
            assert other.correct is not None
            found = mcnemar(one.correct, other.correct)
            gained = found.only_second - found.only_first
            tests.append(
                PairedTest(
                    first=first.label,
                    second=second.label,
                    seed=one.recipe.run.seed,
                    difference=100 * gained / len(one.correct),
                    only_first=found.only_first,
                    only_second=found.only_second,
                    p=found.p,
                    adjusted_p=1.0,
                )
            )
    adjusted = holm([test.p for test in tests])
    return [
        PairedTest(**{**vars(test), "adjusted_p": p})
        for test, p in zip(tests, adjusted, strict=True)
    ]


# ----------------------------------------------------------------------------- LaTeX

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{special: f"\\{special}" for special in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """Any text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def mean_std(group: Group, name: str, digits: int = 2) -> str | None:
    """`78.12 ± 0.20`, or one number without a deviation."""
    mean, deviation = group.mean(name), group.std(name)
    if mean is None:
        return None
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def latex_table(groups: Sequence[Group]) -> str:
    """The comparison as a booktabs table."""
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
