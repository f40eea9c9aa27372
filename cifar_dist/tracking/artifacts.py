"""W&B artifacts: data, teachers, cached logits and checkpoints, identified by their digests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import DIGEST, data_digest, read_digest
from cifar_dist.distill.logit_cache import MANIFEST
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.run_folder.checkpoint import latest_valid
from cifar_dist.utils.recipe_files import read_yaml


def log_inputs(run: Any, data: Path, teachers: Sequence[TeacherConfig]) -> None:
    """Log what a run was made from. Offline runs cannot have inputs: there they are logged as outputs."""
    artifacts = [dataset_artifact(data)]
    for teacher in teachers:
        artifacts.append(model_artifact(Path(teacher.run)))
        if teacher.placement == "cached":
            artifacts.append(logits_artifact(teacher.cache_folder))
    for artifact in artifacts:
        if artifact is not None:
            (run.log_artifact if run.offline else run.use_artifact)(artifact)


def dataset_artifact(data: Path) -> Any:
    """Return the data set as its digest file, without images."""
    digest = data_digest(data)
    metadata = {"digest": digest, **read_digest(data)}
    return file_artifact(f"data-{digest[:12]}", "dataset", metadata, data / DIGEST)


def logits_artifact(cache: Path) -> Any:
    """Return cached logits as their manifest."""
    manifest = json.loads((cache / MANIFEST).read_text())
    return file_artifact(f"logits-{manifest['sha256'][:12]}", "logits", manifest, cache / MANIFEST)


def model_artifact(folder: Path) -> Any | None:
    """Return the newest checkpoint of a run that W&B knows, as paths and digests, or None.

    With tracking.upload_weights it contains the weights.
    """
    run_id = folder / "wandb_id"
    saved = latest_valid(folder / "checkpoints") if run_id.exists() else None
    if saved is None:
        return None
    recipe = read_yaml(folder / "recipe.yaml")
    environment = json.loads((folder / "environment.json").read_text())
    metadata = {name: environment[name] for name in ("data", "teachers")} | {"step": saved.name}
    name = f"model-{run_id.read_text().splitlines()[0]}"
    model = file_artifact(name, "model", metadata, saved / "manifest.json")
    for path in sorted(saved.glob("*.safetensors")):
        if recipe["tracking"]["upload_weights"]:
            model.add_file(str(path))
        else:
            model.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
    return model


def file_artifact(name: str, kind: str, metadata: dict[str, Any], file: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=metadata)
    artifact.add_file(str(file))
    return artifact
