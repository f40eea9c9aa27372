"""metrics.jsonl -> W&B. A copy for the eyes: it may fail, training may not.

The mode is decided before the start, since an unreachable server costs wandb.init 100 seconds and a
missing key raises. After the first failing call W&B is switched off with one warning.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cifar_dist.config import config
from cifar_dist.engine.evaluation import Evaluation
from cifar_dist.engine.metrics import Line
from cifar_dist.engine.runtime import log
from cifar_dist.engine.tracked_media import log_artifacts, show_predictions
from cifar_dist.files import write_file
from cifar_dist.network import ANSWER_SECONDS, answers

Mode = Literal["auto", "online", "offline", "off"]


@config
class TrackingConfig:
    """`auto`: online with a key and a server that answers, offline without the server, else off."""

    mode: Mode = "auto"
    project: str = "cifar_dist"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None  # None: the name without its seed, so that seeds stand together
    job_type: str | None = None  # None: student for a recipe with a teacher, else train
    upload_weights: bool = (
        False  # the final checkpoint as files; otherwise by path and digest alone
    )


def decide_mode(asked: Mode) -> tuple[Literal["online", "offline", "off"], str]:
    """The mode and its reason; takes at most 3 seconds and no call of wandb."""
    forced = os.environ.get("WANDB_MODE")
    if asked == "off" or forced == "disabled":
        return "off", "switched off"
    if importlib.util.find_spec("wandb") is None:
        return "off", "wandb is not installed"
    if asked == "offline" or forced == "offline":
        return "offline", "asked for"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(server)
    if not _has_key(host.hostname or ""):
        if asked == "online":
            return "offline", "no API key; run `wandb login` and later `wandb sync`"
        return "off", "no API key (`wandb login`, or tracking.mode=offline)"
    place = (host.hostname or "", host.port or (443 if host.scheme == "https" else 80))
    if not answers(lambda: socket.create_connection(place, timeout=ANSWER_SECONDS).close()):
        return "offline", f"{host.hostname} does not answer"
    return "online", "a key and a server"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


SEED_IN_NAME = re.compile(r"[._-]?(?:seed|s)[._-]?\d+$")

# What W&B's summary keeps of each curve beside its last value; the headline is summary.json's.
EXTREMES = {
    "eval/top1": "max",
    "eval/top5": "max",
    "eval/loss": "min",
    "eval/val_top1": "max",
    "eval/val_loss": "min",
    "train/top1": "max",
    "train/loss": "min",
}


class Tracker:
    """One W&B run of a training run, whatever number of restarts; no call of it ever raises."""

    def __init__(self) -> None:
        self.run: Any = None  # None: switched off

    def start(
        self,
        config: TrackingConfig,
        folder: Path,
        recipe: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        """Begin or go on; `recipe` (resolved) and `environment` (versions, commit, digests) are the config."""
        self.folder, self.upload_weights = folder, config.upload_weights
        mode, reason = decide_mode(config.mode)
        log.info(f"W&B: {mode} ({reason})")
        if mode == "off":
            return
        with self.never_fatal():
            import wandb

            identity = folder / "wandb_id"
            if not identity.exists():  # the agent of a sweep has chosen one already
                write_file(identity, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
            taught = bool(recipe["teacher"] or recipe["teachers"])
            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=recipe["name"],
                id=identity.read_text().strip(),
                group=config.group or SEED_IN_NAME.sub("", recipe["name"]),
                job_type=config.job_type or ("student" if taught else "train"),
                resume="allow",
                dir=str(folder),
                mode=mode,
                tags=list(config.tags),
                config=recipe | {"environment": environment},
                settings=wandb.Settings(init_timeout=30, console="off"),
            )
            # rows below the last internal step would be dropped after a restart: the step is a value
            self.run.define_metric("*", step_metric="step")
            for name, extreme in EXTREMES.items():
                self.run.define_metric(name, step_metric="step", summary=f"{extreme},last")

    def log(self, line: Line) -> None:
        """Copy one line of metrics.jsonl, its names led by its kind."""
        if self.run is not None:
            with self.never_fatal():
                kind = line["kind"]
                values = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
                self.run.log({"step": line["step"], **values})

    def finish(self, summary: dict[str, Any], evaluation: Evaluation | None = None) -> None:
        """The headline, and at a run's end (with an evaluation) tables, pictures and artifacts."""
        if self.run is None:
            return
        with self.never_fatal():
            self.run.summary.update(summary)
            if evaluation is not None:
                data = Path(self.run.config["data"]["path"])
                show_predictions(self.run, evaluation, data)
                log_artifacts(self.run, self.folder, data, upload_weights=self.upload_weights)
            self.run.finish()

    @contextmanager
    def never_fatal(self) -> Iterator[None]:
        """Turn any failure of W&B into one warning, and W&B off."""
        try:
            yield
        except Exception as error:
            log.warning(f"W&B is off from now on; the run goes on without it ({error!r})")
            self.run = None
