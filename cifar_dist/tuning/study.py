"""Open the folder of a sweep, with Optuna's study, and choose the values of its trials."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from cifar_dist.recipe.diff import flatten
from cifar_dist.recipe.schema import to_dict
from cifar_dist.recipe.sweep import Sweep, Values, load_sweep
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import make_folder, read_json, write_json
from cifar_dist.utils.random import derive_seed

JOURNAL = "journal.log"  # optuna-dashboard opens it


class JournalLock(JournalFileOpenLock):
    """Optuna's lock of the journal, which also removes a last line that a kill left incomplete.

    Optuna would append to that line, and could not read the journal any more.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def acquire(self) -> bool:
        super().acquire()
        with open(self.path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return True


@dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A sweep, its folder and its study."""

    sweep: Sweep
    path: Path
    study: optuna.Study
    epochs: int  # of each trial
    val_size: int  # validation rows

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def trial_folder(self, number: int) -> Path:
        return self.path / f"trial_{number:04d}"

    def log_file(self, number: int) -> Path:
        return self.path / "logs" / f"trial_{number:04d}.txt"


def open_sweep(file: Path) -> SweepFolder:
    """Open the folder of a sweep, which is named like its definition, or create it.

    UserError if the folder was made by another definition; only the number of trials may change.
    """
    sweep, recipe = load_sweep(file)
    folder = file.with_suffix("")
    make_folder(folder / "logs")
    definition = flatten(json.loads(json.dumps(asdict(sweep) | {"recipe": to_dict(recipe)})))
    with exclusive(folder / "definition"):
        stored = read_json(folder / "sweep.json", "restore it")
        if stored is None:
            write_json(folder / "sweep.json", definition)
            stored = definition
    if differences := [
        f"{key}: {stored.get(key)} -> {definition.get(key)}"
        for key in sorted(stored.keys() | definition.keys())
        if stored.get(key) != definition.get(key) and key != "trials"
    ]:
        raise UserError(
            f"{folder} was made by another definition ({'; '.join(differences)}); give {file} another "
            "name"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = str(folder / JOURNAL)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(path, JournalLock(path))),
        study_name=folder.name,
        direction=sweep.direction,
        pruner=build_pruner(sweep),
        load_if_exists=True,
    )
    epochs, val_size = recipe.run.epochs, recipe.data.val_size
    return SweepFolder(sweep=sweep, path=folder, study=study, epochs=epochs, val_size=val_size)


def build_pruner(sweep: Sweep) -> BasePruner:
    if sweep.pruner is None:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=sweep.pruner.min_epochs, reduction_factor=sweep.pruner.reduction_factor
    )


def ask(run: SweepFolder) -> Trial | None:
    """Create the next trial, or return None if the sweep has all of its trials."""
    distributions = {key: distribution(values) for key, values in run.sweep.search.items()}
    with exclusive(run.path / "ask"):  # otherwise several workers would exceed the number
        trials = run.trials
        if not any(trial.state == TrialState.WAITING for trial in trials):
            if len(trials) >= run.sweep.num_trials:
                return None
            # All values are stored at once, and a kill before the next line leaves a waiting trial.
            run.study.enqueue_trial(choose_values(run, trials, distributions))
        return run.study.ask(distributions)


def choose_values(
    run: SweepFolder, trials: list[FrozenTrial], distributions: dict[str, BaseDistribution]
) -> dict[str, Any]:
    """Return the values of the next trial: of its number alone, for TPE also of earlier results."""
    sampler, number = run.sweep.sampler, len(trials)
    if sampler.name == "grid":
        return run.sweep.grid[number]
    seed = derive_seed("sweep", sampler.seed, number) % 2**32
    if sampler.name == "random":
        return optuna.create_study(sampler=RandomSampler(seed)).ask(distributions).params
    tpe = TPESampler(seed=seed, constant_liar=True)
    copy = optuna.create_study(direction=run.sweep.direction, sampler=tpe)
    copy.add_trials(trials)
    return copy.ask(distributions).params


def distribution(values: Values) -> BaseDistribution:
    if values.choices is not None:
        return CategoricalDistribution(values.choices)
    assert values.low is not None
    assert values.high is not None
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def values_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of a trial, by recipe key."""
    return dict(trial.system_attrs["fixed_params"])


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock next to `path`, waiting for it; a dead holder's lock is removed after 30 s."""
    lock = JournalFileOpenLock(os.fspath(path))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
