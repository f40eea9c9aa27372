"""metrics.jsonl -> W&B. A copy for the eyes: it may fail, training may not.

The mode is decided before the start, since an unreachable server costs wandb.init 100 seconds and a
missing key raises. After the first failing call W&B is switched off with one warning, and its own
process ended, which would wait for its server.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.run_folder.records import Record
from cifar_dist.tracking.artifacts import input_artifacts, log_input_artifacts, model_artifact
from cifar_dist.tracking.media import log_predictions
from cifar_dist.utils.config import config
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write
from cifar_dist.utils.log import log
from cifar_dist.utils.network import RESPONSE_SECONDS, responds

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
    server = server_address()
    try:
        host = urlsplit(server)
    except ValueError as error:
        return "offline", f"WANDB_BASE_URL is no address ({error})"
    if not _has_key(host.hostname or ""):
        if asked == "online":
            return "offline", "no API key; run `wandb login`"
        return "off", "no API key (`wandb login`, or tracking.mode=offline)"
    if not is_reachable(server):
        return "offline", f"{host.hostname} does not answer"
    return "online", "a key and a server"


def server_address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def is_reachable(server: str) -> bool:
    """Whether it answers a request within 3 seconds, on the path that a run's start will use."""

    def ask() -> None:
        try:
            urlopen(f"{server}/graphql", timeout=RESPONSE_SECONDS).close()
        except HTTPError:
            pass  # it speaks, if only to refuse
        except (HTTPException, ValueError) as error:
            raise OSError(str(error)) from error

    return responds(ask)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


INIT_SECONDS = 4  # what a start may wait for a server that answered a moment ago
FINISH_SECONDS, WEIGHTS_SECONDS = 60, 600  # what an end may upload, without and with weights

WANDB_ID = re.compile(r"[A-Za-z0-9_-]+")
SEED_IN_NAME = re.compile(r"[._-]?(?:seed|s)[._-]?\d+$")

# What W&B's summary keeps of each curve beside its last value; the headline is summary.json's.
SUMMARY_AGGREGATES = {
    "eval/top1": "max",
    "eval/top5": "max",
    "eval/loss": "min",
    "eval/val_top1": "max",
    "eval/val_loss": "min",
    "train/top1": "max",
    "train/loss": "min",
}


def wandb_run_id(folder: Path) -> str:
    """The W&B id of a run folder; the first call chooses it, unless the agent of a sweep already has."""
    path = folder / "wandb_id"
    if not path.exists():
        atomic_write(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    identity = path.read_text().strip()
    if not WANDB_ID.fullmatch(identity):
        raise UserError(f"{path}: is no id of W&B; delete it, and a new one is made")
    return identity


def offline_folders(folder: Path, identity: str) -> list[Path]:
    """The offline runs with this id in a folder, oldest first; they may be deleted, so it names no other place."""
    if not WANDB_ID.fullmatch(identity):
        raise UserError(f"{folder}: {identity!r} is no id of W&B")
    return sorted(folder.glob(f"wandb/offline-run-*-{identity}"))


def resolve_mode(config: TrackingConfig) -> Literal["online", "offline", "off"]:
    """The mode, after a line in the log that says why."""
    mode, reason = decide_mode(config.mode)
    log.info(f"W&B: {mode} ({reason})")
    return mode


def init_run(
    config: TrackingConfig,
    folder: Path,
    mode: Literal["online", "offline"],
    *,
    identity: str,
    name: str,
    group: str,
    job_type: str,
    said: dict[str, Any],
    resume: Literal["allow"] | None,
) -> Any:
    """W&B's run of this id, with its files in FOLDER/wandb; `group` is a recipe's name, whose seed is left out."""
    import wandb

    return wandb.init(
        project=config.project,
        entity=config.entity,
        name=name,
        id=identity,
        group=config.group or SEED_IN_NAME.sub("", group),
        job_type=job_type,
        resume=resume,
        dir=str(folder.resolve()),  # its own process may work elsewhere
        mode=mode,
        tags=list(config.tags),
        config=said,
        settings=wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=WEIGHTS_SECONDS if config.upload_weights else FINISH_SECONDS,
            console="off",
        ),
    )


class Tracker:
    """One W&B run, of a training run whatever number of restarts; no call of it ever raises."""

    def __init__(self) -> None:
        self.run: Any = None  # None: switched off

    def start(
        self,
        config: TrackingConfig,
        folder: Path,
        recipe: dict[str, Any],
        environment: dict[str, Any],
        teachers: Sequence[TeacherConfig],
    ) -> None:
        """Begin or go on; `recipe` (resolved) and `environment` (versions, commit, digests) are the config."""
        self.folder, self.data, self.teachers = folder, Path(recipe["data"]["path"]), teachers
        mode = resolve_mode(config)
        self.online = mode == "online"
        if mode == "off":
            return
        with self.disable_on_error():
            self.run = init_run(
                config,
                folder,
                mode,
                identity=wandb_run_id(folder),
                name=recipe["name"],
                group=recipe["name"],
                job_type=config.job_type or ("student" if teachers else "train"),
                said=recipe | {"environment": environment},
                resume="allow",
            )
            # rows below the last internal step would be dropped after a restart: the step is a value
            self.run.define_metric("*", step_metric="step")
            for name, extreme in SUMMARY_AGGREGATES.items():
                self.run.define_metric(name, step_metric="step", summary=f"{extreme},last")

    def log(self, line: Record) -> None:
        """Copy one line of metrics.jsonl, its names led by its kind."""
        if self.run is not None:
            with self.disable_on_error():
                kind = line["kind"]
                values = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
                self.run.log({"step": line["step"], **values})

    def finish(self, summary: dict[str, Any], evaluation: EvalResult | None = None) -> None:
        """The headline, and at a run's end (with an evaluation) tables, pictures and artifacts."""
        if self.run is None:
            return
        with self.disable_on_error():
            if self.online and not is_reachable(server_address()):
                raise ConnectionError(f"{server_address()} does not answer any more")
            self.run.summary.update(summary)
            if evaluation is not None:
                self._show(evaluation)
            self.run.finish()

    def _show(self, evaluation: EvalResult) -> None:
        """Tables, pictures and artifacts; without them the curves are uploaded all the same."""
        try:
            log_predictions(self.run, evaluation, self.data)
            log_input_artifacts(self.run, input_artifacts(self.data, self.teachers))
            model = model_artifact(self.folder)
            if model is not None:
                self.run.log_artifact(model, aliases=["final"])
        except Exception as error:
            log.warning(f"W&B has the curves, but not all tables and artifacts ({error!r})")

    @contextmanager
    def disable_on_error(self) -> Iterator[None]:
        """Turn any failure of W&B into one warning, and W&B off."""
        try:
            yield
        except Exception as error:
            log.warning(
                f"W&B is off from now on; the run goes on without it ({error!r}); afterwards: "
                "python -m cifar_dist.sync_wandb RUN"
            )
            self.run = None
            _end_its_process()


def _end_its_process() -> None:
    """End W&B's own process; at the end of this one W&B would wait for it, and it for the server."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that has just ended
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and (process / "exe").resolve().name.startswith("wandb"):
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(Exception, SystemExit):  # that its process is gone, as we know
        import wandb

        wandb.teardown()
