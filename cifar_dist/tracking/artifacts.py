"""Artifacts for W&B: data, teachers, cached logits and checkpoints, each by its digests, and what was made of what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import DIGEST, data_digest, read_digest
from cifar_dist.distill.logit_cache import MANIFEST
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.run_folder.checkpoint import latest_valid
from cifar_dist.utils.strict_yaml import parse_yaml


def log_input_artifacts(run: Any, artifacts: Sequence[Any]) -> None:
    """Say what a W&B run was made of; those that are None are left out.

    An offline run has no inputs in W&B, so there they are logged like outputs and told by their types.
    The same content is one version of an artifact, whoever logs it.
    """
    for artifact in artifacts:
        if artifact is not None:
            (run.log_artifact if run.offline else run.use_artifact)(artifact)


def input_artifacts(data: Path, teachers: Sequence[TeacherConfig]) -> list[Any]:
    """The data set, and of each teacher its weights and, where it is cached, its logits."""
    found = [dataset_artifact(data)]
    for teacher in teachers:
        found.append(model_artifact(Path(teacher.run)))
        if teacher.placement == "cached":
            found.append(logits_artifact(teacher.cache_folder))
    return found


def dataset_artifact(data: Path) -> Any:
    """The data by their digest file, never as pictures."""
    import wandb

    digest = data_digest(data)
    facts = {"digest": digest, **read_digest(data)}
    dataset = wandb.Artifact(f"data-{digest[:12]}", "dataset", metadata=facts)
    dataset.add_file(str(data / DIGEST))
    return dataset


def logits_artifact(cache: Path) -> Any:
    """A teacher's cached logits by their manifest, which has the SHA-256 and all that decides them."""
    import wandb

    said = json.loads((cache / MANIFEST).read_text())
    logits = wandb.Artifact(f"logits-{said['sha256'][:12]}", "logits", metadata=said)
    logits.add_file(str(cache / MANIFEST))
    return logits


def model_artifact(folder: Path) -> Any | None:
    """The newest checkpoint of a run folder, None where the folder is no run that W&B knows.

    By paths and digests, or with the weights as files where the run's own recipe says so.
    """
    import wandb

    identity = folder / "wandb_id"
    saved = latest_valid(folder / "checkpoints") if identity.exists() else None
    if saved is None:
        return None
    recipe = parse_yaml((folder / "recipe.yaml").read_text(), where=str(folder / "recipe.yaml"))
    environment = json.loads((folder / "environment.json").read_text())
    facts = {name: environment[name] for name in ("data", "teachers")} | {"step": saved.name}
    model = wandb.Artifact(f"model-{identity.read_text().strip()}", "model", metadata=facts)
    model.add_file(str(saved / "manifest.json"))  # the SHA-256 of each file
    for path in sorted(saved.glob("*.safetensors")):
        if recipe["tracking"]["upload_weights"]:
            model.add_file(str(path))
        else:
            model.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
    return model
