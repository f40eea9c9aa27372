"""Copy metrics.jsonl to Weights & Biases. A failure of W&B never stops a training.

The mode is decided before wandb.init, which would wait 100 seconds for an unreachable server and raise
without an API key.
"""

from __future__ import annotations

import configparser
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
from cifar_dist.tracking.artifacts import log_inputs, model_artifact
from cifar_dist.tracking.tables import log_predictions
from cifar_dist.utils.config import config
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write
from cifar_dist.utils.log import log
from cifar_dist.utils.network import RESPONSE_SECONDS, responds

Mode = Literal["online", "offline", "off"]
WANDB_MODES: dict[str, Mode] = {"dryrun": "offline", "offline": "offline", "disabled": "off"}

INIT_SECONDS = 4  # the server answered a moment ago
FINISH_SECONDS, WEIGHTS_SECONDS = 60, 600  # for uploads at the end, without and with weights
WANDB_ID = re.compile(r"[A-Za-z0-9_-]+")
SEED_SUFFIX = re.compile(r"(.+?)[._-]?(?:seed|s)[._-]?(\d+)")
SUMMARY_AGGREGATES = {  # stored by W&B besides the last value
    "eval/top1": "max",
    "eval/top5": "max",
    "eval/loss": "min",
    "eval/val_top1": "max",
    "eval/val_loss": "min",
    "train/top1": "max",
    "train/loss": "min",
}


@config
class TrackingConfig:
    """Whether and under which names a run is logged to Weights & Biases."""

    # auto: online with an API key, offline if the server does not answer, off without a key
    mode: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "cifar_dist"  # W&B project
    entity: str | None = None  # W&B user or team; null: the default of the account
    tags: tuple[str, ...] = ()  # W&B tags
    group: str | None = None  # W&B group; null: the run's name without its seed
    # W&B job type; null: student if there is a teacher, otherwise train
    job_type: str | None = None
    upload_weights: bool = False  # upload the final checkpoint, not only its path and digest


def decide_mode(requested: str) -> tuple[Mode, str]:
    """Return the mode and its reason, within 3 seconds."""
    own = wandb_setting("mode") or "online"  # of `wandb offline`, `wandb disabled` or WANDB_MODE
    limit = WANDB_MODES.get(own, "online")
    if requested == "off":
        return "off", "switched off"
    if limit == "off":
        return "off", f"W&B's own mode is {own}"
    if importlib.util.find_spec("wandb") is None:
        return "off", "wandb is not installed"
    if requested == "offline":
        return "offline", "as configured"
    if limit == "offline":
        return "offline", f"W&B's own mode is {own}"
    try:
        host = urlsplit(server_address()).hostname or ""
    except ValueError as error:
        return "offline", f"W&B's base_url is not a valid address ({error})"
    if not has_api_key(host):
        if requested == "online":
            return "offline", "no API key; run `wandb login`"
        return "off", "no API key (`wandb login`, or tracking.mode=offline)"
    return (
        ("online", "server answers") if is_reachable() else ("offline", f"{host} does not answer")
    )


def wandb_setting(name: str) -> str | None:
    """Return a setting as wandb does: from the environment, ./wandb/settings or ~/.config/wandb/settings.

    The files are read here because importing wandb takes half a second, even if tracking is off.
    """
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    local = Path(".wandb" if Path(".wandb").exists() else "wandb")
    values: dict[str, str] = {}
    for file in (folder / "settings", local / "settings"):
        parser = configparser.ConfigParser()
        with suppress(OSError, ValueError, configparser.Error):  # wandb ignores a damaged file, too
            parser.read(file)
            values |= dict(parser.items("default"))
    return values.get(name)


def server_address() -> str:
    return wandb_setting("base_url") or "https://api.wandb.ai"


def is_reachable() -> bool:
    """Return whether the server answers within 3 seconds, on the path that wandb.init uses."""

    def request() -> None:
        try:
            urlopen(f"{server_address()}/graphql", timeout=RESPONSE_SECONDS).close()
        except HTTPError:
            pass  # an answer, if only a refusal
        except (HTTPException, ValueError) as error:
            raise OSError(str(error)) from error

    return responds(request)


def has_api_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    return False


def name_without_seed(name: str, seed: int) -> str:
    """Return `name` without a suffix like `_s1` or `seed1` if its number is the run's seed."""
    match = SEED_SUFFIX.fullmatch(name)
    return match[1] if match and int(match[2]) == seed else name


def wandb_run_id(folder: Path) -> str:
    """Return the W&B id of a run folder; the first call creates it, or takes that of a sweep's agent.

    The file has the id and the folder it was created for. A copy of the folder gets a new id, while a
    moved folder keeps its own.
    """
    path, here = folder / "wandb_id", str(folder.resolve())
    run_id, origin = read_id(path)
    if path.exists():
        checked_id(run_id, path)
        if origin == here:
            return run_id
        if read_id(Path(origin, path.name))[0] == run_id:
            log.info(f"W&B: {folder} is a copy of {origin}, so it gets another id")
            run_id = ""
    run_id = run_id or sweep_run_id(folder) or secrets.token_hex(4)
    atomic_write(path, f"{run_id}\n{here}\n")
    return run_id


def read_id(path: Path) -> tuple[str, str]:
    """Return the W&B id in a file and the folder it was created for; the id is "" without a file."""
    lines: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        lines = path.read_text().splitlines()
    run_id, origin = (*lines, "", "")[:2]
    return run_id.strip(), origin or str(path.parent.resolve())


def sweep_run_id(folder: Path) -> str | None:
    """Return the id that a sweep's agent passes, or None if there is none or another run has it."""
    run_id = os.environ.get("WANDB_RUN_ID")
    if run_id is None:
        return None
    taken = any(read_id(path)[0] == run_id for path in folder.parent.glob("*/wandb_id"))
    if "WANDB_SWEEP_ID" in os.environ and not taken:
        return checked_id(run_id, folder)
    reason = "another run has it" if taken else "only a sweep sets the id of a run"
    log.info(f"W&B: WANDB_RUN_ID={run_id} is ignored: {reason}")
    return None


def checked_id(run_id: str, path: Path) -> str:
    if not WANDB_ID.fullmatch(run_id):  # it becomes part of paths that are deleted
        raise UserError(f"{path}: {run_id!r} is not a W&B id; delete it, and a new one is created")
    return run_id


def offline_folders(folder: Path, run_id: str) -> list[Path]:
    """Return the offline runs of an id, oldest first."""
    return sorted(folder.glob(f"wandb/offline-run-*-{checked_id(run_id, folder)}"))


class Tracker:
    """One W&B run for a training and all its restarts. Its methods never raise."""

    def __init__(self) -> None:
        self.run: Any = None  # None: off

    def start(
        self,
        config: TrackingConfig,
        folder: Path,
        recipe: dict[str, Any],
        environment: dict[str, Any],
        teachers: Sequence[TeacherConfig],
    ) -> None:
        """Start or resume the run; resolved recipe and environment become its config."""
        self.folder, self.data, self.teachers = folder, Path(recipe["data"]["path"]), teachers
        self.labels = recipe["data"]["labels"]
        self.mode, reason = decide_mode(config.mode)
        log.info(f"W&B: {self.mode} ({reason})")
        if self.mode == "off":
            return
        with self.disable_on_error():
            import wandb

            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=recipe["name"],
                id=wandb_run_id(folder),
                group=config.group or name_without_seed(recipe["name"], recipe["run"]["seed"]),
                job_type=config.job_type or ("student" if teachers else "train"),
                resume="allow",
                dir=str(folder.resolve()),  # wandb's process may have another working directory
                mode=self.mode,
                tags=list(config.tags),
                config=recipe | {"environment": environment},
                settings=wandb.Settings(
                    init_timeout=INIT_SECONDS,
                    finish_timeout=WEIGHTS_SECONDS if config.upload_weights else FINISH_SECONDS,
                    console="off",
                ),
            )
            # W&B drops rows below its own last step after a restart, so the step is a value.
            self.run.define_metric("*", step_metric="step")
            for name, aggregate in SUMMARY_AGGREGATES.items():
                self.run.define_metric(name, step_metric="step", summary=f"{aggregate},last")

    def log(self, record: Record) -> None:
        """Log a record of metrics.jsonl; its kind becomes a prefix of the names."""
        if self.run is not None:
            with self.disable_on_error():
                values = {f"{record['kind']}/{k}": v for k, v in record.items() if k != "kind"}
                step = values.pop(f"{record['kind']}/step")
                self.run.log({"step": step, **values})

    def finish(self, summary: dict[str, Any], result: EvalResult | None = None) -> None:
        """Log the summary and, with the final evaluation, tables and artifacts; end the run."""
        if self.run is None:
            return
        with self.disable_on_error():
            if self.mode == "online" and not is_reachable():
                raise ConnectionError(f"{server_address()} stopped answering")
            self.run.summary.update(summary)
            if result is not None:
                self.log_final(result)
            self.run.finish()

    def log_final(self, result: EvalResult) -> None:
        """Log tables and artifacts; if that fails, the curves are still uploaded."""
        try:
            log_predictions(self.run, result, self.data, self.labels)
            log_inputs(self.run, self.data, self.teachers)
            model = model_artifact(self.folder)
            if model is not None:
                self.run.log_artifact(model, aliases=["final"])
        except Exception as error:
            log.warning(f"W&B: some tables and artifacts are missing ({error!r})")

    @contextmanager
    def disable_on_error(self) -> Iterator[None]:
        """Turn an error of W&B into a warning, and switch W&B off."""
        try:
            yield
        except Exception as error:
            log.warning(
                f"W&B is off, the run continues without it ({error!r}); to upload afterwards: "
                "python -m cifar_dist.sync_wandb RUN"
            )
            self.run = None
            kill_wandb_process()


def kill_wandb_process() -> None:
    """Kill wandb's process; otherwise this process waits for it at exit, and it for its server."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # a process that has just ended
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and (process / "exe").resolve().name.startswith("wandb"):
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(Exception, SystemExit):  # its process is gone
        import wandb

        wandb.teardown()
