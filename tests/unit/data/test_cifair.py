"""ciFAIR-100 in its published layout: no filenames, str keys, a folder or a zip."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cifair_files import content, write_cifair

from cifar_dist.data.dataset import load_split
from cifar_dist.data.ingest.cifair import cifair_split
from cifar_dist.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_folder_parent_folder_and_zip_give_the_same_split(
    tmp_path: Path, data: Path, protocol: int
) -> None:
    folder = write_cifair(tmp_path, content(), protocol=protocol)
    test = load_split(data, "test")
    for source in (folder, tmp_path, tmp_path / "ciFAIR-100.zip"):
        split, published = cifair_split(source, data, CPU)
        assert torch.equal(split.images, test.images)
        assert torch.equal(split.labels, test.labels)
        assert not published
    assert {path.name for path in tmp_path.iterdir()} == {"ciFAIR-100", "ciFAIR-100.zip"}


@pytest.mark.parametrize("missing", ["data", "fine_labels", "coarse_labels"])
def test_only_filenames_and_batch_label_are_optional(
    tmp_path: Path, data: Path, missing: str
) -> None:
    value = content()
    del value["batch_label"]
    write_cifair(tmp_path, value)
    assert len(cifair_split(tmp_path, data, CPU)[0].labels) == 23
    del value[missing]
    write_cifair(tmp_path, value)
    with pytest.raises(UserError, match="its keys are not"):
        cifair_split(tmp_path, data, CPU)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_invalid_sources_are_refused_without_executing_code(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere is not ciFAIR-100"):
        cifair_split(tmp_path / "nowhere", data, CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="give the folder ciFAIR-100 that contains test"):
        cifair_split(tmp_path / "empty", data, CPU)
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(UserError, match="is not ciFAIR-100"):
        cifair_split(tmp_path / "text.zip", data, CPU)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("test", b"")
    with pytest.raises(UserError, match="no item named"):
        cifair_split(tmp_path / "other.zip", data, CPU)
    write_cifair(tmp_path, content() | {"data": Hostile()})
    with pytest.raises(UserError, match="test pickle is invalid"):
        cifair_split(tmp_path, data, CPU)
    assert not (tmp_path / "was_run").exists()
    other = [(coarse + 1) % 20 for coarse in content()["coarse_labels"]]
    write_cifair(tmp_path, content() | {"coarse_labels": other})
    with pytest.raises(UserError, match="other superclasses"):
        cifair_split(tmp_path, data, CPU)
