"""metrics.jsonl -> one W&B run, whatever number of restarts, offline starts and failures it had."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cifar_dist.command_line import command_parser
from cifar_dist.engine import results
from cifar_dist.engine.metrics import MetricsFile
from cifar_dist.engine.runtime import log, log_to_terminal
from cifar_dist.engine.tracking import Tracker, decide_mode
from cifar_dist.errors import UserError, run_command
from cifar_dist.files import sha256, write_json
from cifar_dist.recipe import load_recipe, resolved

UPLOAD_SECONDS = 600


def rebuild(folder: Path) -> Path:
    """Replace the run's offline folders by one that holds all of metrics.jsonl; the new folder."""
    recipe = load_recipe(folder / "recipe.yaml")
    identity = folder / "wandb_id"
    if identity.exists():
        for old in offline_folders(folder):
            shutil.rmtree(old)
    tracker = Tracker()
    environment = results.read_json(folder / "environment.json") or {}
    offline = replace(recipe.tracking, mode="offline")
    tracker.start(offline, folder, resolved(recipe), environment)
    for line in MetricsFile(folder / "metrics.jsonl").read():
        tracker.log(line)
    alive = tracker.run is not None
    tracker.finish(results.read_summary(folder) or {})
    made = offline_folders(folder) if alive else []
    if len(made) != 1:
        raise UserError(f"{folder}: W&B wrote no offline run; see the warning above")
    return made[0]


def offline_folders(folder: Path) -> list[Path]:
    """The run's offline folders; UserError for an id that could name another place, as they are deleted."""
    identity = (folder / "wandb_id").read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", identity):
        raise UserError(f"{folder / 'wandb_id'}: is no id of W&B; delete it, and a new one is made")
    return list(folder.glob(f"wandb/offline-run-*-{identity}"))


def upload(offline: Path) -> bool:
    """Whether W&B took the run; it replaces what the server has under its id."""
    mode, reason = decide_mode("online")
    if mode != "online":
        log.info(f"not uploaded: {reason}; later: wandb sync {offline}")
        return False
    command = [sys.executable, "-m", "wandb", "sync", str(offline)]
    try:
        done = subprocess.run(command, timeout=UPLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"W&B took longer than {UPLOAD_SECONDS} s; try again later") from None
    if done.returncode:
        raise UserError(f"`wandb sync` failed with code {done.returncode}; see what it says above")
    return True


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "sync_wandb",
        "Rebuild one W&B run from a run's metrics.jsonl, and upload it where a server answers. A second "
        "call changes nothing unless the run went on.",
        "python -m cifar_dist.sync_wandb runs/r18_32",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    folder = parser.parse_args(arguments).run
    log_to_terminal()
    metrics = folder / "metrics.jsonl"
    for needed in (folder / "recipe.yaml", metrics):
        if not needed.exists():
            raise UserError(f"{folder} is no run folder with reports (no {needed.name} in it)")
    summary = folder / "summary.json"
    now = {path.name: sha256(path) for path in (metrics, summary) if path.exists()}
    note = folder / "wandb_synced.json"
    before = results.read_json(note) or {}
    offline = Path(before.get("offline", ""))
    if before.get("of") != now or not offline.is_dir():
        offline, before = rebuild(folder), {}
        log.info(f"{offline}: all of {metrics}")
    if before.get("uploaded"):
        log.info(f"{folder}: nothing new since the last upload")
        return 0
    write_json(note, {"of": now, "offline": str(offline), "uploaded": upload(offline)})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
