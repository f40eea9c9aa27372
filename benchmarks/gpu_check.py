"""Check a GPU machine in three parts: a (correctness), b (speed), c (accuracy).

Each part prints a table and writes OUTPUT/gpu_check_PART.json and its logs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cifar_dist.training.environment import git_commit, package_version
from cifar_dist.utils.host import processor_name

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pyarrow", "datasets")
TAIL = 4000  # characters printed of a failed command's log


def machine() -> dict[str, Any]:
    """Return the hardware, versions, date and commit."""
    cuda = torch.cuda.is_available()
    return {
        "hardware": torch.cuda.get_device_name() if cuda else processor_name(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {name: package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
    }


def run(command: list[str], log: Path, *, seconds: float) -> dict[str, Any]:
    """Run a command with its output in `log`; after `seconds` send SIGTERM, 60 s later SIGKILL."""
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return {"exit_code": process.returncode, "seconds": round(time.perf_counter() - began, 1)}


def print_result(
    name: str, result: dict[str, Any], log: Path, *, ok: tuple[int, ...] = (0,)
) -> bool:
    """Print a table row, and the end of the log on failure; return whether the exit code is in `ok`."""
    passed = result["exit_code"] in ok
    print(f"{'ok  ' if passed else 'FAIL'} {result['seconds']:6.1f} s  {name}", flush=True)
    if not passed:
        print(log.read_text()[-TAIL:], flush=True)
    return passed


def check_tests(output: Path, *, parallel: int, only: str) -> tuple[dict[str, Any], bool]:
    """Run each GPU test in a separate process, `parallel` at a time."""
    listed = subprocess.run(
        [*PYTEST, "--collect-only", "-k", only, "tests/training/test_gpu.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if not tests:
        print(listed.stdout[-TAIL:], listed.stderr[-TAIL:])

    def run_test(number: int) -> dict[str, Any]:
        command = [*PYTEST, tests[number], "--basetemp", str(output / f"tmp_{number}")]
        return run(command, output / f"test_{number}.log", seconds=170)

    with ThreadPoolExecutor(parallel) as pool:
        results = list(pool.map(run_test, range(len(tests))))
    passed = [
        print_result(name.partition("::")[2], result, output / f"test_{number}.log")
        for number, (name, result) in enumerate(zip(tests, results, strict=True))
    ]
    return dict(zip(tests, results, strict=True)), bool(tests) and all(passed)


def part_a(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    tests, passed = check_tests(options.output, parallel=options.parallel, only=options.only)
    if options.only:
        return {"tests": tests}, passed
    log = options.output / "doctor.log"
    command = [sys.executable, "-m", "cifar_dist.prepare", "--sample"]
    command += ["--output", str(options.output / "sample")]
    prepared = run(command, options.output / "prepare.log", seconds=60)
    passed &= print_result("prepare --sample", prepared, options.output / "prepare.log")
    command = [sys.executable, "-m", "cifar_dist.doctor", "recipes/debug.yaml"]
    command += [
        f"data.path={options.output / 'sample'}",
        f"run.output_dir={options.output / 'runs'}",
    ]
    doctor = run(command, log, seconds=60)
    passed &= print_result("doctor", doctor, log)
    return {"tests": tests, "doctor": doctor | {"output": log.read_text().splitlines()}}, passed


def part_b(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    steps = options.output / "step_times.json"
    command = [sys.executable, "benchmarks/step_times.py", "--output", str(steps)]
    command += ["--seconds", str(options.seconds), "--only", options.only, "--set", *options.set]
    log = options.output / "step_times.log"
    result = run(command, log, seconds=options.limit or 230)
    print(log.read_text())
    times = json.loads(steps.read_text())["steps"] if steps.exists() else {}
    return {"steps": times, "run": result}, result["exit_code"] == 0


def part_c(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Train the two recipes one after the other, each with a time limit."""
    runs: dict[str, Any] = {}
    passed = True
    for recipe, limit in ("speed_75", 60.0), ("r18_32", options.limit or 270.0):
        command = [sys.executable, "-m", "cifar_dist.train", f"recipes/{recipe}.yaml"]
        command += [f"data.path={options.data}", f"run.output_dir={options.output / 'runs'}"]
        command += ["tracking.mode=off", *options.set]
        log = options.output / f"{recipe}.log"
        result = run(command, log, seconds=limit)
        passed &= print_result(recipe, result, log, ok=(0, 75))
        summary = options.output / "runs" / recipe / "summary.json"
        if summary.exists():
            result["summary"] = json.loads(summary.read_text())
            for name in ("top1", "epochs", "seconds"):
                print(f"    {name}: {result['summary'].get(name)}")
        runs[recipe] = result
    return {"runs": runs}, passed


PARTS = {"a": part_a, "b": part_b, "c": part_c}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar100"), help="prepared data, part c"
    )
    parser.add_argument("--parallel", type=int, default=6, help="concurrent GPU tests, part a")
    parser.add_argument(
        "--only", default="", help="part a: pytest -k expression; part b: substring of the row"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds per row, part b")
    parser.add_argument("--limit", type=float, help="seconds for part b, or for r18_32 in part c")
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides, parts b and c")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    content, passed = PARTS[options.part](options)
    path = options.output / f"gpu_check_{options.part}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    print(f"{path}: {'passed' if passed else 'failed, see above'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
