"""metrics.jsonl -> W&B. A copy for the eyes: it may fail, training may not.

The mode is decided before the start, since an unreachable server costs wandb.init 100 seconds and a
missing key raises. After the first failing call W&B is switched off with one warning.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cifar_dist.config import config
from cifar_dist.engine.metrics import Line
from cifar_dist.engine.runtime import log
from cifar_dist.files import write_file

Mode = Literal["auto", "online", "offline", "off"]
ANSWER_SECONDS = 3


@config
class TrackingConfig:
    """`auto`: online with a key and a server that answers, offline without the server, else off."""

    mode: Mode = "auto"
    project: str = "cifar_dist"
    entity: str | None = None
    tags: tuple[str, ...] = ()


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
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname or "", port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return "offline", f"{host.hostname} does not answer"
    return "online", "a key and a server"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """One W&B run of a training run, whatever number of restarts; no call of it ever raises."""

    def __init__(self) -> None:
        self.run: Any = None  # None: switched off

    def start(
        self, config: TrackingConfig, *, folder: Path, name: str, recipe: dict[str, Any]
    ) -> None:
        mode, reason = decide_mode(config.mode)
        log.info(f"W&B: {mode} ({reason})")
        if mode == "off":
            return
        with self.never_fatal():
            import wandb

            identity = folder / "wandb_id"
            if not identity.exists():
                write_file(identity, secrets.token_hex(4))
            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=name,
                id=identity.read_text().strip(),
                resume="allow",
                dir=str(folder),
                mode=mode,
                tags=list(config.tags),
                config=recipe,
                settings=wandb.Settings(init_timeout=30, console="off"),
            )
            # rows below the last internal step would be dropped after a restart: the step is a value
            self.run.define_metric("*", step_metric="step")

    def log(self, line: Line) -> None:
        """Copy one line of metrics.jsonl, its names led by its kind."""
        if self.run is not None:
            with self.never_fatal():
                kind = line["kind"]
                values = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
                self.run.log({"step": line["step"], **values})

    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is not None:
            with self.never_fatal():
                self.run.summary.update(summary)
                self.run.finish()

    @contextmanager
    def never_fatal(self) -> Iterator[None]:
        """Turn any failure of W&B into one warning, and W&B off."""
        try:
            yield
        except Exception as error:
            log.warning(f"W&B is off from now on; the run goes on without it ({error!r})")
            self.run = None
