"""Train recipes under several seeds and keep their accuracies: a list of runs that one can interrupt.

Each run is `accelerate launch -m cifar_dist.train`; where it was interrupted it goes on by itself.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # Ctrl-C is the end of the budget, from the first moment on

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_dist.data.dataset import DIGEST, data_digest
from cifar_dist.recipe.diff import NON_SEMANTIC_KEYS, config_diff, flatten
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.run_folder.results import read_summary
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write, folder_lock, read_json, write_json

SAVE_SECONDS = 120  # what a training may take to save; then it is killed
EPILOG = """\
examples:
  python benchmarks/accuracy.py recipes/r18_32.yaml --budget 30
  python benchmarks/accuracy.py recipes/tutorial/*.yaml --budget 240 --seeds 0,1,2,3,4
  python benchmarks/accuracy.py recipes/debug.yaml --budget 10 --seeds 0 run.epochs=2 \\
    --config_file accelerate_configs/cpu_2.yaml

The same command goes on where the last one stopped and starts nothing that is finished. With
--budget 0 it only shows what there is. The results file may hold other recipes' results; they stay.
"""

Row = dict[str, Any]  # one finished run, as the results file has it


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recipe under one seed."""

    recipe: Recipe  # as the training sees it: its name ends in _seed{k}
    base: str  # the recipe's own name
    arguments: list[str]  # of cifar_dist.train

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, as {"run.epochs": 200, ...}."""
        pairs = flatten(to_dict(self.recipe)).items()
        return {name: value for name, value in pairs if not name.startswith(NON_SEMANTIC_KEYS)}

    def is_among(self, rows: list[Row]) -> bool:
        """Whether the results hold this run, whatever has become of its folder.

        UserError where they hold its recipe with other settings, which no mean may mix.
        """
        settings, data = self.settings, Path(self.recipe.data.path)
        if (data / DIGEST).exists():
            settings |= {"data": data_digest(data)}
        for row in (row for row in rows if row["recipe"] == self.base):
            before = row["settings"] | ({"data": row["data"]} if "data" in settings else {})
            changed = [
                f"{name}: {old} -> {new}"
                for name, old, new in config_diff(before, settings)
                if name not in ("name", "run.seed") and not name.startswith(NON_SEMANTIC_KEYS)
            ]
            if changed:
                raise UserError(
                    f"the results hold {row['name']} with other settings ({'; '.join(changed)}); "
                    "give the recipe another name (name=...), or choose another --output"
                )
        return self.recipe.name in (row["name"] for row in rows)

    def row(self) -> Row | None:
        """What its folder says once it is finished."""
        summary = read_summary(self.recipe.folder)
        if not summary or not summary["finished"]:
            return None
        surroundings = read_json(self.recipe.folder / "environment.json")
        measured = ("top1", "top5", "best_test_top1", "epochs", "seconds", "images_per_second")
        held_out = ("val_top1",) if self.recipe.data.val_size else ()
        return {
            "recipe": self.base,
            "seed": self.recipe.run.seed,
            **{
                name: summary[name]
                for name in (*measured, *held_out, "peak_memory_bytes", "parameters")
            },
            **{name: surroundings[name] for name in ("hardware", "world_size", "commit", "data")},
            "torch": surroundings["packages"]["torch"],
            "date": surroundings["started"],
            "name": self.recipe.name,
            "settings": self.settings,
        }


def refuse_twice(names: list[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two recipes have the name {twice}; a run is known by its recipe's name")


def plan(wanted: list[tuple[Path, list[str]]], seeds: list[int]) -> list[Run]:
    """All runs of (recipe, changes to it); seed by seed: an early end leaves each recipe as many."""
    names = [load_recipe(path, overrides).name for path, overrides in wanted]
    refuse_twice(names)
    runs = []
    for seed in seeds:
        for (path, overrides), base in zip(wanted, names, strict=True):
            own = [*overrides, f"name={base}_seed{seed}", f"run.seed={seed}"]
            runs.append(Run(recipe=load_recipe(path, own), base=base, arguments=[str(path), *own]))
    return runs


def start_and_wait(command: list[str], deadline: float) -> int | None:
    """Run a training until it ends: its exit code, or None where it was asked to save and stop.

    It is asked at the deadline (of time.monotonic) or after a signal. What it prints, it prints
    here; it has ended when nobody holds its output any more, be the launcher dead long before.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for this process alone
    )

    def send(number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def forward() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line.decode(errors="replace"), end="", flush=True)

    output = threading.Thread(target=forward, daemon=True)
    output.start()
    asked = False
    try:
        while output.is_alive():
            output.join(0.1)
            if not asked and (signals.stop_signal() or time.monotonic() > deadline):
                print("asked to save and stop", flush=True)
                send(signal.SIGTERM)
                asked, deadline = True, time.monotonic() + SAVE_SECONDS
            if asked and time.monotonic() > deadline:
                send(signal.SIGKILL)
                break
    except KeyboardInterrupt:  # the second Ctrl-C
        send(signal.SIGKILL)
        raise
    code = process.wait()
    return None if asked else code


def results(rows: list[Row]) -> dict[str, Any]:
    """The results file: mean and sample standard deviation per recipe, then the runs themselves."""

    def spread(values: list[float]) -> dict[str, float | None]:
        std = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "std": std}

    def group(base: str) -> Iterator[tuple[str, Any]]:
        mine = [row for row in rows if row["recipe"] == base]
        yield "n", len(mine)
        held_out = ("val_top1",) if "val_top1" in mine[0] else ()
        for name in ("top1", "top5", "best_test_top1", *held_out, "seconds", "images_per_second"):
            yield name, spread([row[name] for row in mine])

    bases = dict.fromkeys(row["recipe"] for row in rows)
    return {
        "what": "accuracy",
        "recipes": {base: dict(group(base)) for base in bases},
        "runs": rows,
    }


def read_rows(path: Path) -> list[Row]:
    """The runs in a results file; none where there is no file."""
    content = read_json(path)
    if path.exists() and (not isinstance(content, dict) or content.get("what") != "accuracy"):
        raise UserError(f"{path} is no results file of this benchmark; choose another --output")
    return content["runs"] if content else []


def keep(path: Path, row: Row) -> list[Row]:
    """Add a run to the results file, to which another list may have added some; all there are now."""
    with folder_lock(path.parent):
        rows = [*(other for other in read_rows(path) if other["name"] != row["name"]), row]
        write_json(path, results(rows))
    return rows


def table(content: dict[str, Any]) -> str:
    def shown(value: dict[str, float | None]) -> str:
        return f"{value['mean']:.2f}" + (f" +- {value['std']:.2f}" if value["std"] else "")

    lines = [f"{'recipe':<40}{'n':>3}{'top1, last':>18}{'top5':>18}{'best test epoch':>18}{'s':>9}"]
    for base, numbers in content["recipes"].items():
        cells = (shown(numbers[name]) for name in ("top1", "top5", "best_test_top1"))
        seconds = numbers["seconds"]["mean"]
        lines.append(
            f"{base:<40}{numbers['n']:>3}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{seconds:>9.0f}"
        )
    return "\n".join(lines)


def seed_list(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise UserError(f"--seeds {text}: write numbers with commas between, like 0,1,2")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def command_line(
    script: str, description: str, epilog: str, *, words: str, meaning: str
) -> ArgumentParser:
    """The options of a list of runs."""
    parser = ArgumentParser(
        prog=f"python benchmarks/{script}",
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar=words, help=meaning)
    parser.add_argument(
        "--budget", type=float, required=True, metavar="MINUTES", help="stop and save after these"
    )
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument(
        "--output",
        type=Path,
        help="the results, JSON; default: benchmarks/results/accuracy_cuda.json, or ..._cpu.json",
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="copy each finished run's metrics.jsonl there"
    )
    parser.add_argument(
        "--least",
        type=float,
        default=1.0,
        metavar="MINUTES",
        help="start no run with less than this left (default: 1)",
    )
    parser.add_argument("--config_file", type=Path, help="given to accelerate launch")
    return parser


def train_all(runs: list[Run], options: Namespace, *, started: float) -> int:
    """Train what is not finished, one after another; the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output or Path(__file__).parent / f"results/accuracy_{device}.json"
    rows = read_rows(output)
    finished = {run.recipe.name for run in runs if run.is_among(rows)}
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if options.config_file:
        launch += ["--config_file", str(options.config_file)]
    gpus = torch.cuda.device_count()

    deadline = started + 60 * options.budget
    remaining, failed = [], []
    for run in runs:
        name = run.recipe.name
        if name in finished:
            print(f"{name}: finished before")
            continue
        if signals.stop_signal() or deadline - time.monotonic() < 60 * options.least:
            remaining.append(name)
            continue
        print(f"{name}: {(deadline - time.monotonic()) / 60:.1f} minutes left", flush=True)
        micro_batches = run.recipe.run.micro_batches or gpus
        fewer = (
            ["--num_processes", str(micro_batches)]
            if micro_batches < gpus and not options.config_file
            else []
        )
        command = [*launch, *fewer, "-m", "cifar_dist.train", *run.arguments]
        code = start_and_wait(command, deadline)
        row = run.row() if code == 0 else None
        if row:
            rows = keep(output, row)
            if options.logs:
                log = (run.recipe.folder / "metrics.jsonl").read_text()
                options.logs.mkdir(parents=True, exist_ok=True)
                atomic_write(options.logs / f"{name}.jsonl", log)
        elif code is None:
            remaining.append(name)
        else:
            failed.append(name)
    if rows:
        print(f"\n{table(results(rows))}")
    if remaining:
        print(
            f"{len(remaining)} of {len(runs)} runs remain: {', '.join(remaining)}; "
            "the same command goes on"
        )
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see above")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    parser = command_line(
        "accuracy.py",
        "Train recipes under several seeds within a budget; start it again to go on.",
        EPILOG,
        words="RECIPE | section.key=value",
        meaning="YAML files, see recipes/, and changes to all of them",
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    paths = [Path(word) for word in options.words if "=" not in word]
    if not paths:
        parser.error("which recipes?")
    runs = plan([(path, overrides) for path in paths], seed_list(options.seeds))
    return train_all(runs, options, started=started)


if __name__ == "__main__":
    sys.exit(run_command(main))
