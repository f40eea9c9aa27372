"""Train recipes under several seeds within a time budget and collect their accuracies.

Each run is started with `accelerate launch -m cifar_dist.train` and resumes after an interruption.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # before the slow imports: Ctrl-C ends the budget

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
from cifar_dist.utils.files import atomic_write, folder_lock, try_read_json, write_json

SAVE_SECONDS = 120  # grace period for saving before SIGKILL
EPILOG = """\
examples:
  python benchmarks/accuracy.py recipes/r18_32.yaml --budget 30
  python benchmarks/accuracy.py recipes/tutorial/*.yaml --budget 240 --seeds 0,1,2,3,4
  python benchmarks/accuracy.py recipes/debug.yaml --budget 10 --seeds 0 run.epochs=2 \\
    --config_file accelerate_configs/cpu_2.yaml

Running the same command again resumes interrupted runs and skips finished ones. --budget 0 trains
nothing and prints the results. Results of other recipes in the results file are kept.
"""

Row = dict[str, Any]  # one finished run in the results file


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recipe under one seed."""

    recipe: Recipe  # its name ends in _seed{k}
    base: str  # name of the recipe without the seed
    arguments: list[str]  # for cifar_dist.train

    @property
    def settings(self) -> dict[str, Any]:
        """Return all keys that affect the result, as {"run.epochs": 200, ...}."""
        pairs = flatten(to_dict(self.recipe)).items()
        return {name: value for name, value in pairs if not name.startswith(NON_SEMANTIC_KEYS)}

    def is_in(self, rows: list[Row]) -> bool:
        """Return whether the results contain this run, even if its folder is gone.

        Raise UserError if they contain the same recipe with other settings: the mean would mix both.
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
                    f"the results contain {row['name']} with other settings ({'; '.join(changed)}); "
                    "rename the recipe (name=...) or choose another --output"
                )
        return self.recipe.name in (row["name"] for row in rows)

    def result(self) -> Row | None:
        """Return the row of a finished run, read from its folder, or None."""
        summary = read_summary(self.recipe.folder)
        if not summary or not summary["finished"]:
            return None
        environment = try_read_json(self.recipe.folder / "environment.json") or {}
        columns = ["top1", "top5", "best_test_top1", "epochs", "seconds", "images_per_second"]
        if self.recipe.data.val_size:
            columns.append("val_top1")
        return {
            "recipe": self.base,
            "seed": self.recipe.run.seed,
            **{name: summary[name] for name in (*columns, "peak_memory_bytes", "parameters")},
            **{name: environment[name] for name in ("hardware", "world_size", "commit", "data")},
            "torch": environment["packages"]["torch"],
            "date": environment["started"],
            "name": self.recipe.name,
            "settings": self.settings,
        }


def check_unique(names: list[str]) -> None:
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two recipes are named {duplicate}; give one another name (name=...)")


def plan_runs(recipes: list[tuple[Path, list[str]]], seeds: list[int]) -> list[Run]:
    """Return the runs of all (recipe, overrides), seed by seed.

    With this order, every recipe has about the same number of seeds when the budget ends.
    """
    names = [load_recipe(path, overrides).name for path, overrides in recipes]
    check_unique(names)
    runs = []
    for seed in seeds:
        for (path, overrides), base in zip(recipes, names, strict=True):
            words = [*overrides, f"name={base}_seed{seed}", f"run.seed={seed}"]
            arguments = [str(path), *words]
            runs.append(Run(recipe=load_recipe(path, words), base=base, arguments=arguments))
    return runs


def start_and_wait(command: list[str], deadline: float) -> int | None:
    """Run a training and return its exit code, or None if it was interrupted.

    Interrupt it at the deadline (of time.monotonic) or after a signal. Its output is printed here.
    The training has ended when its output is closed: ranks may outlive their launcher.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # keep Ctrl-C from reaching the training
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
    interrupted = False
    try:
        while output.is_alive():
            output.join(0.1)
            if not interrupted and (signals.stop_signal() or time.monotonic() > deadline):
                print("stopping the run; it saves a checkpoint first", flush=True)
                send(signal.SIGTERM)
                interrupted, deadline = True, time.monotonic() + SAVE_SECONDS
            if interrupted and time.monotonic() > deadline:
                send(signal.SIGKILL)
                break
    except KeyboardInterrupt:  # the second Ctrl-C
        send(signal.SIGKILL)
        raise
    code = process.wait()
    return None if interrupted else code


def results(rows: list[Row]) -> dict[str, Any]:
    """Return the content of a results file: statistics of each recipe, then the runs."""

    def mean_std(values: list[float]) -> dict[str, float | None]:
        std = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "std": std}

    def group(base: str) -> Iterator[tuple[str, Any]]:
        group_rows = [row for row in rows if row["recipe"] == base]
        yield "n", len(group_rows)
        val = ("val_top1",) if "val_top1" in group_rows[0] else ()
        for name in ("top1", "top5", "best_test_top1", *val, "seconds", "images_per_second"):
            yield name, mean_std([row[name] for row in group_rows])

    bases = dict.fromkeys(row["recipe"] for row in rows)
    return {
        "what": "accuracy",
        "recipes": {base: dict(group(base)) for base in bases},
        "runs": rows,
    }


def read_rows(path: Path) -> list[Row]:
    """Return the runs of a results file, or an empty list if there is no file."""
    content = try_read_json(path)
    if path.exists() and (content is None or content.get("what") != "accuracy"):
        raise UserError(f"{path}: not a results file of accuracy.py; choose another --output")
    return content["runs"] if content else []


def add_row(path: Path, row: Row) -> list[Row]:
    """Add a run to the results file, under a lock, and return all runs in it."""
    with folder_lock(path.parent):
        rows = [*(other for other in read_rows(path) if other["name"] != row["name"]), row]
        write_json(path, results(rows))
    return rows


def table(content: dict[str, Any]) -> str:
    def mean_std(value: dict[str, float | None]) -> str:
        return f"{value['mean']:.2f}" + (f" +- {value['std']:.2f}" if value["std"] else "")

    lines = [
        f"{'recipe':<40}{'n':>3}{'top-1, last':>18}{'top-5':>18}{'best test epoch':>18}{'s':>9}"
    ]
    for base, numbers in content["recipes"].items():
        cells = (mean_std(numbers[name]) for name in ("top1", "top5", "best_test_top1"))
        seconds = numbers["seconds"]["mean"]
        lines.append(
            f"{base:<40}{numbers['n']:>3}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{seconds:>9.0f}"
        )
    return "\n".join(lines)


def seed_list(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise UserError(f"--seeds {text}: expected comma-separated integers, for example 0,1,2")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def command_line(
    script: str, description: str, epilog: str, *, words: str, meaning: str
) -> ArgumentParser:
    """Return the parser shared by accuracy.py and shortened.py."""
    parser = ArgumentParser(
        prog=f"python benchmarks/{script}",
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar=words, help=meaning)
    parser.add_argument(
        "--budget",
        type=float,
        required=True,
        metavar="MINUTES",
        help="save and stop after this time",
    )
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument(
        "--output",
        type=Path,
        help="results file (JSON); default: benchmarks/results/accuracy_cuda.json or ..._cpu.json",
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="copy metrics.jsonl of finished runs here"
    )
    parser.add_argument(
        "--least",
        type=float,
        default=1.0,
        metavar="MINUTES",
        help="minimum time left to start a run (default: 1)",
    )
    parser.add_argument("--config_file", type=Path, help="passed to accelerate launch")
    return parser


def train_all(runs: list[Run], options: Namespace, *, started: float) -> int:
    """Train the unfinished runs one after another and return the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output or Path(__file__).parent / f"results/accuracy_{device}.json"
    rows = read_rows(output)
    finished = {run.recipe.name for run in runs if run.is_in(rows)}
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
        command = list(launch)
        if micro_batches < gpus and not options.config_file:
            command += ["--num_processes", str(micro_batches)]
        code = start_and_wait([*command, "-m", "cifar_dist.train", *run.arguments], deadline)
        row = run.result() if code == 0 else None
        if row:
            rows = add_row(output, row)
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
            "run the same command again to continue"
        )
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see above")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    parser = command_line(
        "accuracy.py",
        "Train recipes under several seeds within a time budget; run it again to continue.",
        EPILOG,
        words="RECIPE | section.key=value",
        meaning="recipe files, and overrides for all of them",
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    paths = [Path(word) for word in options.words if "=" not in word]
    if not paths:
        parser.error("name at least one recipe")
    runs = plan_runs([(path, overrides) for path in paths], seed_list(options.seeds))
    return train_all(runs, options, started=started)


if __name__ == "__main__":
    sys.exit(run_command(main))
